"""The run folder: written whole or not at all."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedqlora.config import RunConfig, validate
from fedqlora.errors import CheckpointError, ConfigError
from server.checkpoint import Checkpoint, Origin, RunFolder
from server.metrics import Metrics

CONFIG = validate(RunConfig, {"model": {"base": "tiny"}}, "run.toml")


def checkpoint(round_: int, size: int = 4) -> Checkpoint:
    return Checkpoint(
        round=round_,
        adapter={"m.lora_A.weight": np.full((size, 4), round_, dtype=np.float32)},
        residual={"m.lora_A.weight": np.full((2, 4), -round_, dtype=np.float32)},
        memory={"first/m": np.full(3, round_ / 2, dtype=np.float32)},
        origin=Origin(base_digest="d", family="causal"),
        issued=7,
    )


def test_the_newest_round_comes_back_as_saved(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    assert folder.latest() is None
    for round_ in (0, 1, 2):
        folder.save(checkpoint(round_))
    newest = RunFolder(folder.path).latest()
    assert newest is not None
    assert (newest.round, newest.origin, newest.issued) == (2, checkpoint(2).origin, 7)
    np.testing.assert_array_equal(newest.adapter["m.lora_A.weight"], np.full((4, 4), 2))
    np.testing.assert_array_equal(newest.residual["m.lora_A.weight"], np.full((2, 4), -2))
    np.testing.assert_array_equal(newest.memory["first/m"], np.full(3, 1.0))
    assert RunFolder(folder.path).config() == CONFIG


def test_two_runs_of_one_name_have_two_folders(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, CONFIG).name != RunFolder.create(tmp_path, CONFIG).name


FULL_DISK = """
import resource, sys
from pathlib import Path
from server.checkpoint import RunFolder
from tests.server.test_checkpoint import checkpoint
folder = RunFolder(Path(sys.argv[1]))
# A file size limit fails a write in its middle, as a full disk does.
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder.save(checkpoint(1, size=1024))
"""


def test_a_full_disk_leaves_the_rounds_before_and_nothing_half_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.save(checkpoint(0))
    before = sorted(path.name for path in folder.path.rglob("*"))
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder.path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CheckpointError" in result.stderr
    assert "free space" in result.stderr
    assert sorted(path.name for path in folder.path.rglob("*")) == before
    newest = folder.latest()
    assert newest is not None
    assert newest.round == 0


def test_a_checkpoint_cut_off_by_a_crash_is_not_seen(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.save(checkpoint(0))
    leftover = folder.path / "rounds" / ".0001.new"
    leftover.mkdir()
    (leftover / "adapter.safetensors").write_bytes(b"half")
    newest = folder.latest()
    assert newest is not None
    assert newest.round == 0
    folder.save(checkpoint(1))
    assert not leftover.exists()


def test_a_damaged_checkpoint_and_a_foreign_folder_are_named(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.save(checkpoint(0))
    for name in ("adapter.safetensors", "residual.safetensors", "memory.safetensors"):
        file = folder.path / "rounds" / "0000" / name
        whole = file.read_bytes()
        file.write_bytes(b"half")
        with pytest.raises(CheckpointError, match="0000 is damaged"):
            folder.latest()
        file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder(tmp_path)


def test_a_run_folder_of_another_release_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    (folder.path / "config.json").write_text('{"model": {"base": "tiny"}, "modle": 1}')
    with pytest.raises(ConfigError, match="modle is not a known key"):
        folder.config()


def test_metrics_of_an_unfinished_round_are_dropped_on_resume(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append("joined", site="a")
    metrics.append("round", round=1)
    metrics.append("site", round=2, site="a")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "cut o')
    metrics.forget_after(1)
    assert [line["event"] for line in metrics.read()] == ["joined", "round"]
