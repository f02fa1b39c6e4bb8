"""Real trainers with control variates and a server optimizer, and a liar whom the canary finds."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from fedqlora import protocol_pb2 as pb
from fedqlora.codec import encode
from fedqlora.config import RunConfig
from server.checkpoint import RunFolder
from server.metrics import Metrics
from tests.federation.conftest import Hospitals
from tests.federation.test_attacks import Liar, describe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def optimized(hospitals: Hospitals) -> RunFolder:
    sections = {
        "training": {"control_variates": True, "proximal": 0.01},
        "server_optimizer": {"name": "momentum"},
    }
    folder = hospitals.new_run(rounds=2, steps=5, method="fedavg", sections=sections)
    assert hospitals.run(folder).completed, folder.status()
    return folder


def test_a_run_with_scaffold_fedprox_and_momentum_learns_and_keeps_its_memory(
    hospitals: Hospitals, optimized: RunFolder
) -> None:
    newest = optimized.latest()
    assert newest is not None
    for name in newest.adapter:
        assert newest.memory[f"control/{name}"].any()
        assert newest.memory[f"first/{name}"].any()
    lines = Metrics(optimized.path / "metrics.jsonl").read()
    losses = [line["scores"]["all"]["loss"] for line in lines if line["event"] == "evaluation"]
    assert losses[2] < losses[0]
    assert hospitals.outcomes(optimized, 2) == {"a": "used", "b": "used"}
    log = hospitals.scratch / "processes" / "trainer-a" / "audit.jsonl"
    trained = [line for line in log.read_text().splitlines() if '"control"' in line]
    assert len(trained) == 2


class Saboteur(Liar):
    """Unlearns: sends ten times what an honest run of the same start learnt, backwards."""

    def __init__(self, honest: RunFolder) -> None:
        super().__init__(describe(honest))
        start = load_file(honest.path / "rounds" / "0000" / "adapter.safetensors")
        newest = honest.latest()
        assert newest is not None
        self._backwards = {name: 10 * (start[name] - newest.adapter[name]) for name in start}

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        if not isinstance(body, pb.Train):
            return super().perform(header, config, body)
        count = config.training.steps * config.training.batch_examples
        return pb.Update(delta=encode(self._backwards, "float32"), examples=count, tokens=1)


def test_a_round_that_a_liar_spoiled_is_set_back_by_the_real_evaluator_and_he_is_excluded(
    hospitals: Hospitals, optimized: RunFolder
) -> None:
    sections = {
        "aggregation": {"canary": 0.02, "exclude_after": 1},
    }
    folder = hospitals.new_run(
        rounds=2, steps=5, method="fedavg", sections=sections, min_sites=1, expected_sites=2
    )
    with hospitals.impostor("b", Saboteur(optimized)):
        assert hospitals.run(folder).completed, folder.status()
    lines = Metrics(folder.path / "metrics.jsonl").read()
    (rollback,) = [line for line in lines if line["event"] == "rollback"]
    assert (rollback["round"], rollback["site"]) == (1, "b")
    assert hospitals.outcomes(folder, 1) == {"a": "used", "b": "used"}
    # Round 1 ends where it began, and round 2 goes on without him.
    rounds = folder.path / "rounds"
    start, first = (rounds / f"000{number}" / "adapter.safetensors" for number in (0, 1))
    assert start.read_bytes() == first.read_bytes()
    assert hospitals.outcomes(folder, 2) == {"a": "used"}
    losses = [line["scores"]["all"]["loss"] for line in lines if line["event"] == "evaluation"]
    assert losses[0] == losses[1] > losses[2]
