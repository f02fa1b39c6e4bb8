"""Feedback: what one update leaves out goes into the next, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.feedback import Feedback
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import decode_delta
from fedqlora.config import CodecConfig
from fedqlora.errors import DataError, UpdateError

TOP1 = CodecConfig(update="topk", topk_fraction=0.25)  # one value of four


def delta(*values: float) -> Adapter:
    return {"a": np.array(values, dtype=np.float32)}


def send(
    folder: Path, round_: int, change: Adapter, codec: CodecConfig = TOP1, run: str = "r"
) -> list[float]:
    """Encode as a trainer that was just started does, and decode as the server does."""
    tensors = Feedback(folder).encode(change, codec, run=run, round_=round_)
    decoded = decode_delta(tensors, AdapterSpec.of(change))
    return [float(value) for value in decoded["a"]]


def test_a_small_value_is_sent_once_enough_of_it_is_left_and_never_without_feedback(
    tmp_path: Path,
) -> None:
    change = delta(4, 0, 3, 1)
    assert send(tmp_path, 1, change) == [4, 0, 0, 0]
    assert send(tmp_path, 2, change) == [0, 0, 6, 0]
    assert send(tmp_path, 3, change) == [8, 0, 0, 0]
    plain = TOP1.model_copy(update={"error_feedback": False})
    for round_ in (1, 2, 3):
        assert send(tmp_path / "plain", round_, change, plain) == [4, 0, 0, 0]
    assert not (tmp_path / "plain").exists()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["int8", "nf4", "topk"]),
    st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
)
def test_what_was_sent_and_what_is_kept_sum_to_the_deltas(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, changes: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("feedback")
    codec = TOP1.model_copy(update={"update": encoding})
    sent = np.zeros(4)
    for number, change in enumerate(changes, start=1):
        sent += send(folder, number, delta(*change), codec)
    # A last round without a change of its own, that sends everything: all that is kept.
    everything = CodecConfig(update="topk", topk_fraction=1.0)
    kept = send(folder, len(changes) + 1, delta(0, 0, 0, 0), everything)
    np.testing.assert_allclose(sent + kept, np.sum(changes, axis=0), rtol=0, atol=0.2)


def test_a_round_done_again_takes_what_the_round_before_left_out(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    first = send(tmp_path, 2, delta(0, 1, 0, 2))
    assert first == [0, 4, 0, 0]
    # Its own first attempt left out [0, 0, 0, 2]: taken from there, the 4 would be lost and
    # the 2 sent twice.
    for _ in range(2):
        assert send(tmp_path, 2, delta(0, 1, 0, 2)) == first
    assert send(tmp_path, 3, delta(0, 0, 0, 0)) == [0, 0, 0, 2]


def test_a_crash_while_the_file_is_written_changes_nothing(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    # As a full disk does, it keeps round 2's file from being written.
    run = next(tmp_path.iterdir())
    obstacle = run / "2.safetensors.new"
    obstacle.mkdir()
    with pytest.raises(OSError, match=r"2\.safetensors\.new"):
        send(tmp_path, 2, delta(0, 1, 0, 2))
    obstacle.rmdir()
    assert send(tmp_path, 2, delta(0, 1, 0, 2)) == [0, 4, 0, 0]


def test_a_run_set_back_forgets_the_rounds_that_are_done_anew(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    send(tmp_path, 2, delta(0, 0, 0, 9))
    send(tmp_path, 3, delta(0, 0, 5, 0))
    send(tmp_path, 2, delta(7, 0, 6, 0))
    # Round 3 is skipped this time: round 4 takes what round 2 left out in its second attempt.
    assert send(tmp_path, 4, delta(0, 0, 0, 0)) == [0, 0, 6, 0]


def test_nothing_passes_to_another_run_or_to_other_shapes(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    assert send(tmp_path, 2, delta(0, 0, 1, 0, 0)) == [0, 0, 1, 0, 0]
    send(tmp_path, 1, delta(4, 3, 0, 0), run="r")
    assert send(tmp_path, 2, delta(0, 0, 1, 0), run="other") == [0, 0, 1, 0]
    # The first run's file is gone with its own folder.
    assert send(tmp_path, 2, delta(0, 0, 1, 0), run="r") == [0, 0, 1, 0]


def test_only_two_rounds_of_one_run_are_kept_and_only_for_the_trainer_to_read(
    tmp_path: Path,
) -> None:
    for run, round_ in (("first", 1), ("r", 1), ("r", 2), ("r", 3)):
        send(tmp_path, round_, delta(4, 3, 0, 0), run=run)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in files] == ["2.safetensors", "3.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_an_update_that_cannot_be_encoded_leaves_what_is_kept_as_it_was(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    with pytest.raises(UpdateError, match="not finite"):
        send(tmp_path, 2, delta(np.nan, 0, 0, 0))
    assert send(tmp_path, 2, delta(0, 0, 0, 0)) == [0, 3, 0, 0]


def test_a_damaged_file_is_named_and_its_removal_advised(tmp_path: Path) -> None:
    send(tmp_path, 1, delta(4, 3, 0, 0))
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"1\.safetensors is damaged; remove it"):
        send(tmp_path, 2, delta(0, 0, 0, 0))
    path.unlink()
    assert send(tmp_path, 2, delta(0, 0, 2, 0)) == [0, 0, 2, 0]
