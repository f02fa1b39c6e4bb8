"""Rounds: what is folded in, what is refused, and that a resumed run ends the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from flwr.app import Error
from safetensors.numpy import save

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, initial_adapter
from fedqlora.envelope import claimed_header, sign
from fedqlora.errors import FederationError, UpdateError
from fedqlora.halves import Method
from server.checkpoint import Checkpoint, RunFolder
from server.metrics import Metrics
from server.rounds import federate
from tests.server.conftest import SPEC, House, LearningSite, keep, run_config, site_key

A, B = "m.lora_A.weight", "m.lora_B.weight"


def outcomes(house: House, round_: int) -> dict[str, str]:
    return {
        line["site"]: line["outcome"]
        for line in Metrics(house.folder.path / "metrics.jsonl").read()
        if line["event"] == "site" and line["round"] == round_
    }


def reasons(house: House) -> str:
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    return " ".join(line.get("reason", "") for line in lines)


def events(house: House, event: str) -> list[dict[str, Any]]:
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    return [line for line in lines if line["event"] == event]


def finish(house: House) -> Checkpoint:
    return federate(house.folder, house.exchange(), len(house.sites), None)


def run(house: House) -> Adapter:
    return finish(house).adapter


def test_two_rounds_of_two_sites_give_the_weighted_mean(house: House) -> None:
    house.admit("a", LearningSite(target=1.0, examples=4))
    house.admit("b", LearningSite(target=5.0, examples=12))
    # The sites' mean target is (4*1 + 12*5)/16 = 4; each round goes half the way: 0, 2, 3.
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))
    assert outcomes(house, 1) == {"a": "used", "b": "used"}
    assert (house.folder.path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_start_is_the_seeded_adapter(house: House) -> None:
    house.admit("a", LearningSite(target=0.0))
    house.admit("b", LearningSite(target=0.0))
    start = initial_adapter(SPEC, house.folder.config().seed, {})
    np.testing.assert_allclose(run(house)["m.lora_A.weight"], start["m.lora_A.weight"] / 4)


def poisoned(value: float) -> Callable[[Adapter], Adapter]:
    return lambda delta: {name: np.full_like(array, value) for name, array in delta.items()}


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (LearningSite(target=9.0, spoil=poisoned(np.nan)), "not finite"),
        (LearningSite(target=9.0, spoil=poisoned(1e4)), "max_update_norm"),
        (LearningSite(target=9.0, spoil=lambda d: {B: d[B]}), "lacks tensor"),
        (LearningSite(target=9.0, spoil=lambda d: {**d, B: d[B].T.copy()}), "has shape"),
        (LearningSite(target=9.0, examples=10**6), "claims 1000000 examples"),
        (LearningSite(target=9.0, examples=0), "weight 0"),
    ],
    ids=["nan", "too large", "tensor missing", "wrong shape", "too many examples", "no weight"],
)
def test_a_bad_update_is_left_out_and_named(house: House, site: LearningSite, reason: str) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    house.admit("bad", site)
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))
    assert outcomes(house, 1) == {"a": "used", "b": "used", "bad": "invalid"}
    assert reason in reasons(house)


def refuse(_delta: Adapter) -> Adapter:
    raise UpdateError("this site does not send its update")


def test_the_bytes_of_every_answer_are_counted_also_where_it_is_refused(house: House) -> None:
    last: dict[str, dict[str, int]] = {}

    def watch(name: str, answer: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def watched(sent: bytes) -> bytes:
            reply = answer(sent)
            if name == "forged" and claimed_header(sent).round > 0:
                reply += b"?"
            last[name] = {"bytes_down": len(sent), "bytes_up": len(reply)}
            return reply

        return watched

    spoils = {"a": keep, "b": keep, "refusing": refuse, "forged": keep}
    for node, (name, spoil) in enumerate(spoils.items(), start=1):
        service = house.admit(name, LearningSite(target=1.0, spoil=spoil))
        house.grid.nodes[node] = watch(name, service.exchange)
    run(house)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    newest = {line["site"]: line for line in lines if line["event"] == "site"}
    assert outcomes(house, 2) == {
        "a": "used",
        "b": "used",
        "refusing": "refused",
        "forged": "invalid",
    }
    for name, counted in last.items():
        assert {key: newest[name][key] for key in counted} == counted
    # A float32 update of fourteen values cannot be smaller than they are.
    assert newest["a"]["bytes_up"] > 14 * 4


def test_an_enrolled_site_cannot_answer_in_another_sites_name(house: House) -> None:
    """Flower authenticates a node, not a reply: without signatures this would pass."""
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    evil = house.admit("evil", LearningSite(target=9.0))

    def forge(sent: bytes) -> bytes:
        honest = pb.Envelope.FromString(evil.exchange(sent))
        header = pb.Header.FromString(honest.header)
        if header.kind != pb.UPDATE:
            return honest.SerializeToString()
        return sign(
            site_key("evil"),
            run=header.run,
            round_=header.round,
            site="a",
            kind=pb.UPDATE,
            issued=header.issued,
            payload=honest.payload,
            replies_to=header.replies_to,
        )

    house.grid.nodes[3] = forge
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))
    assert outcomes(house, 1)["evil"] == "invalid"
    assert "in the name of a" in reasons(house)


def test_a_reply_to_an_earlier_round_is_refused(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    honest = house.admit("c", LearningSite(target=4.0)).exchange
    first_update: list[bytes] = []

    def replay(sent: bytes) -> bytes:
        reply = honest(sent)
        if pb.Header.FromString(pb.Envelope.FromString(reply).header).kind == pb.UPDATE:
            first_update.append(reply)
            return first_update[0]
        return reply

    house.grid.nodes[3] = replay
    run(house)
    assert outcomes(house, 1)["c"] == "used"
    assert outcomes(house, 2)["c"] == "invalid"
    assert "another instruction" in reasons(house)


def test_a_site_that_never_answers_does_not_hang_the_run(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    service = house.admit("slow", LearningSite(target=4.0))

    def silent_in_training(sent: bytes) -> bytes | None:
        kind = pb.Header.FromString(pb.Envelope.FromString(sent).header).kind
        return service.exchange(sent) if kind == pb.DESCRIBE else None

    house.grid.nodes[3] = silent_in_training
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))
    assert outcomes(house, 1)["slow"] == "late"


def test_a_round_below_min_sites_ends_the_run_and_names_who_is_missing(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    service = house.admit("b", LearningSite(target=4.0))

    def dies_in_training(sent: bytes) -> bytes | Error:
        kind = pb.Header.FromString(pb.Envelope.FromString(sent).header).kind
        return service.exchange(sent) if kind == pb.DESCRIBE else Error(1, "node gone")

    house.grid.nodes[2] = dies_in_training
    with pytest.raises(FederationError, match=r"round 1 has 1 usable updates .* b lost"):
        run(house)
    newest = house.folder.latest()
    assert newest is not None
    assert newest.round == 0


def test_sites_with_different_base_models_end_the_run_with_their_names(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0, base_digest="e" * 64))
    with pytest.raises(FederationError, match=r"a: base d+, .*b: base e+"):
        run(house)
    assert house.sites["a"].trained == []


def test_sites_with_different_adapters_end_the_run(house: House) -> None:
    other = AdapterSpec(shapes=(SPEC.shapes[0],))
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0, spec=other))
    with pytest.raises(FederationError, match="do not have the same base model"):
        run(house)


def test_too_few_sites_are_waited_for_and_then_named(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    del house.grid.nodes[2]
    with pytest.raises(FederationError, match="1 of at least 2 sites"):
        run(house)


def test_a_node_that_hangs_while_it_describes_itself_holds_up_the_start_only(
    house: House,
) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    house.admit("hangs", LearningSite(target=4.0))
    asked: list[bytes] = []
    house.grid.nodes[3] = asked.append
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))
    assert len(asked) == 1


def test_a_site_that_joins_after_the_start_is_used_from_then_on(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    late = house.admit("late", LearningSite(target=4.0))
    del house.grid.nodes[3]
    first = house.grid.nodes[1]

    def admit_while_training(sent: bytes) -> bytes:
        house.grid.nodes[3] = late.exchange
        return first(sent)

    # Node 1's first training instruction brings the third site; its description must not.
    def watch(sent: bytes) -> bytes:
        kind = pb.Header.FromString(pb.Envelope.FromString(sent).header).kind
        return admit_while_training(sent) if kind == pb.TRAIN else first(sent)

    house.grid.nodes[1] = watch
    run(house)
    assert set(outcomes(house, 1)) == {"a", "b"}
    assert outcomes(house, 2) == {"a": "used", "b": "used", "late": "used"}


def test_a_late_joiner_with_another_base_model_is_left_out(house: House) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(rounds=1))
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    run(house)
    house.folder.write_json("config.json", run_config(rounds=2).model_dump())
    house.admit("other", LearningSite(target=9.0, base_digest="e" * 64))
    run(house)
    assert set(outcomes(house, 2)) == {"a", "b"}


def test_a_superlink_that_is_gone_is_one_sentence(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))

    def gone(sent: bytes) -> bytes:
        raise httpx.ConnectError(f"connection refused after {len(sent)} bytes")

    house.grid.nodes[2] = gone
    with pytest.raises(FederationError, match="the SuperLink does not answer"):
        run(house)


def test_a_node_that_is_not_in_the_roster_is_left_out(house: House) -> None:
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0))
    house.admit("stranger", LearningSite(target=9.0))
    del house.sites["stranger"]
    np.testing.assert_allclose(run(house)[B], np.full((3, 2), 3.0))


def tilted(seed: int) -> Callable[[Adapter], Adapter]:
    """A site's own direction: without it all deltas, and so their products, are parallel."""
    return lambda delta: {
        name: value + np.random.default_rng(seed).normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in delta.items()
    }


@pytest.mark.parametrize("method", get_args(Method))
def test_a_resumed_run_ends_with_the_same_bits_as_an_unbroken_one(
    house: House, method: str
) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(method, rounds=4))
    for name, target, seed in (("a", 1.0, 1), ("b", 0.3, 2)):
        house.admit(name, LearningSite(target=target, examples=7, spoil=tilted(seed)))
    unbroken = finish(house)
    assert bool(unbroken.residual) == (method == "exact_svd")
    # As if the ServerApp had been killed in round 3: its checkpoint and what follows are gone.
    for round_ in (3, 4):
        shutil.rmtree(house.folder.path / "rounds" / f"{round_:04d}")
    trained_before = list(house.sites["a"].trained)
    resumed = finish(house)
    assert house.sites["a"].trained == [*trained_before, 3, 4]
    assert save(resumed.adapter) == save(unbroken.adapter)
    assert save(resumed.residual) == save(unbroken.residual)
    rounds = [line["round"] for line in events(house, "round")]
    assert rounds == [1, 2, 3, 4]


def test_exact_svd_sends_the_residual_and_records_what_it_keeps(house: House) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config("exact_svd"))
    house.admit("a", LearningSite(target=1.0, spoil=tilted(1)))
    house.admit("b", LearningSite(target=-1.0, spoil=tilted(2)))
    checkpoint = finish(house)
    first, second = house.sites["a"].residuals
    assert first == {}
    # A layer of 3 x 4 has at most rank 3: two train, one is left.
    assert {name: value.shape for name, value in second.items()} == {A: (1, 4), B: (3, 1)}
    assert set(checkpoint.residual) == {A, B}
    rounds = events(house, "round")
    assert rounds[0]["residual_norm"] > 0
    assert rounds[0]["discarded_norm"] < 1e-6
    down = [line["bytes_down"] for line in events(house, "site") if line["site"] == "a"]
    assert down[1] - down[0] > second[A].nbytes + second[B].nbytes


@pytest.mark.parametrize(("method", "sent"), [("ffa", [B, B]), ("rolora", [B, A])])
def test_only_the_half_that_trains_is_taken(house: House, method: str, sent: list[str]) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(method))
    seen: list[str] = []

    def note(delta: Adapter) -> Adapter:
        seen.extend(delta)
        return delta

    house.admit("a", LearningSite(target=4.0, spoil=note))
    house.admit("b", LearningSite(target=4.0))
    more = {A: np.ones((2, 4), np.float32), B: np.ones((3, 2), np.float32)}
    house.admit("eager", LearningSite(target=4.0, spoil=lambda _: more))
    run(house)
    assert seen == sent
    assert outcomes(house, 1) == {"a": "used", "b": "used", "eager": "invalid"}
    assert "unknown tensor" in reasons(house)


def test_sites_of_mixed_ranks_are_folded_into_one_adapter(house: House) -> None:
    config = run_config("exact_svd", mixed_ranks=True)
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    house.admit("a", LearningSite(target=1.0))
    house.admit("low", LearningSite(target=-1.0, rank=1))
    wide = {A: np.ones((3, 4), np.float32), B: np.ones((3, 3), np.float32)}
    house.admit("wide", LearningSite(target=1.0, spoil=lambda _: wide))
    uneven = {A: np.ones((2, 4), np.float32), B: np.ones((3, 1), np.float32)}
    house.admit("uneven", LearningSite(target=1.0, spoil=lambda _: uneven))
    assert run(house)[A].shape == (2, 4)
    ranks = {line["site"]: line["rank"] for line in events(house, "site") if "rank" in line}
    assert ranks == {"a": 2, "low": 1}
    assert outcomes(house, 2) == {
        "a": "used", "low": "used", "wide": "invalid", "uneven": "invalid",
    }  # fmt: skip
    assert "rank 3; train at a rank from 1 to 2" in reasons(house)


def test_a_lower_rank_without_mixed_ranks_is_left_out(house: House) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config("exact_svd"))
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=1.0))
    house.admit("low", LearningSite(target=1.0, rank=1))
    run(house)
    assert outcomes(house, 1)["low"] == "invalid"
    assert "has shape" in reasons(house)
