"""Server optimizers: Flower's numbers on A and B, and plain arithmetic on dense products."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig, validate
from fedqlora.server_optimizer_config import ServerOptimizerConfig
from server.aggregation.aggregate import Aggregate
from server.aggregation.control import ControlMean
from server.aggregation.exact_svd import ExactSvd
from server.aggregation.fedavg import FedAvg
from server.aggregation.fedopt import FedOpt
from server.aggregation.momentum import Momentum
from server.checkpoint import Checkpoint, RunFolder
from server.rounds import federate
from tests.server.conftest import House, LearningSite, run_config
from tests.server.test_exactness import A, B, Case, cases, dense_mean, function

Strategy = FedAvgM | FedAdam | FedYogi


def step(
    config: ServerOptimizerConfig, start: Adapter, delta: Adapter, memory: Adapter
) -> Aggregate:
    optimizer = FedOpt(FedAvg(start), start, list(start), config, memory)
    optimizer.add("a", delta, 1)
    return optimizer.finish()


def test_momentum_by_hand() -> None:
    config = ServerOptimizerConfig(name="momentum", momentum=0.5, learning_rate=2.0)
    first = step(config, {"m": np.array([1], np.float32)}, {"m": np.array([3], np.float32)}, {})
    assert first.adapter["m"] == 1 + 2 * 3
    second = step(config, first.adapter, {"m": np.array([-1], np.float32)}, first.memory)
    # V = 0.5 * 3 - 1
    assert second.adapter["m"] == 7 + 2 * 0.5


def flower_step(strategy: Strategy, round_: int, start: Adapter, mean: Adapter) -> Adapter:
    """What Flower's strategy makes of one reply that holds the mean."""
    arrays = ArrayRecord({name: Array(value) for name, value in start.items()})
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = arrays
    else:
        strategy.current_arrays = dict(start)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(value) for name, value in mean.items()}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    reply = Message(content, reply_to=Message(RecordDict(), 1, "train"))
    found, _ = strategy.aggregate_train(round_, [reply])
    assert found is not None
    return {name: array.numpy().astype(np.float32) for name, array in found.items()}


@pytest.mark.parametrize(
    ("config", "strategy", "ahead"),
    [
        (
            ServerOptimizerConfig(name="momentum", momentum=0.9, learning_rate=0.7),
            FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
            0,
        ),
        (
            ServerOptimizerConfig(name="adam", learning_rate=0.05, tau=1e-2),
            FedAdam(eta=0.05, tau=1e-2),
            # Flower raises the betas to the number of the round plus one.
            1,
        ),
        (
            ServerOptimizerConfig(name="yogi", learning_rate=0.05, tau=1e-2),
            FedYogi(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-2),
            0,
        ),
    ],
    ids=["momentum", "adam", "yogi"],
)
def test_five_rounds_are_flowers(
    config: ServerOptimizerConfig, strategy: Strategy, ahead: int
) -> None:
    generator = np.random.default_rng(1)
    ours = theirs = {"m": generator.normal(0, 1, (3, 4)).astype(np.float32)}
    memory: Adapter = {}
    for round_ in range(1, 6):
        delta = {"m": generator.normal(0, 0.1, (3, 4)).astype(np.float32)}
        result = step(config, ours, delta, memory)
        ours, memory = result.adapter, result.memory
        theirs = flower_step(strategy, round_ - ahead, theirs, {"m": theirs["m"] + delta["m"]})
        np.testing.assert_allclose(ours["m"], theirs["m"], rtol=2e-5, atol=1e-6)


@given(cases(), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_momentum_of_products_is_that_of_dense_ones(case: Case, beta: float, rate: float) -> None:
    """Eight rounds beside W and V in full size and float64, with mixed ranks, nothing capped."""
    state = Aggregate(adapter=case.start())
    velocity = np.zeros((case.d_out, case.d_in))
    for round_ in range(1, 9):
        deltas = case.deltas((A, B), round_, mixed=True)
        present = function(case.scale, state)
        velocity = beta * velocity + dense_mean(case, state, deltas) - present
        momentum = Momentum(beta=beta, rate=rate, rank=4096, memory=state.memory)
        exact = ExactSvd(
            state.adapter, state.residual, scale=case.scale, residual_rank=4096, momentum=momentum
        )
        for number, (delta, weight) in enumerate(zip(deltas, case.weights, strict=True)):
            exact.add(f"s{number}", delta, weight)
        state = exact.finish()
        expected = present + rate * velocity
        error = np.linalg.norm(function(case.scale, state) - expected)
        assert error < 1e-4 * (np.linalg.norm(expected) + np.linalg.norm(velocity))


def test_the_kept_momentum_has_the_rank_it_may_have() -> None:
    case = Case(20, 20, 2, 1.0, (2,) * 4, (1,) * 4, 7)
    momentum = Momentum(beta=0.9, rate=1.0, rank=5, memory={})
    exact = ExactSvd(case.start(), {}, scale=1.0, residual_rank=8, momentum=momentum)
    for number, delta in enumerate(case.deltas((A, B), 1, mixed=False)):
        exact.add(f"s{number}", delta, 1)
    shapes = {name: value.shape for name, value in exact.finish().memory.items()}
    assert shapes == {f"momentum/{A}": (5, 20), f"momentum/{B}": (20, 5)}


def test_the_mean_control_variate_moves_by_the_share_of_sites_that_came() -> None:
    control = ControlMean({"m": np.array([1], np.float32)}, registered=4)
    control.add("a", {"m": np.array([2], np.float32)})
    control.add("b", {"m": np.array([6], np.float32)})
    # 1 + 2/4 * (2 + 6)/2
    assert control.finish()["control/m"] == 3


OPTIMIZED = {
    "momentum on fedavg": ("fedavg", {"server_optimizer": {"name": "momentum"}}),
    "momentum on exact_svd": ("exact_svd", {"server_optimizer": {"name": "momentum"}}),
    "adam on fedavg": ("fedavg", {"server_optimizer": {"name": "adam"}}),
    "yogi on ffa": ("ffa", {"server_optimizer": {"name": "yogi"}}),
    "scaffold on fedavg": ("fedavg", {"training": {"control_variates": True}}),
    "scaffold and adam on ffa": (
        "ffa",
        {"training": {"control_variates": True}, "server_optimizer": {"name": "adam"}},
    ),
}


def config_of(case: str, rounds: int) -> RunConfig:
    method, sections = OPTIMIZED[case]
    return run_config(method, rounds=rounds, sections=sections)


@pytest.mark.parametrize("case", OPTIMIZED)
def test_a_resumed_run_has_the_memory_of_an_unbroken_one(house: House, case: str) -> None:
    def finish() -> Checkpoint:
        return federate(house.folder, house.exchange(), len(house.sites), None)

    house.folder = RunFolder.create(house.tmp_path / "runs", config_of(case, 4))
    for name, target in (("a", 1.0), ("b", 0.3)):
        house.admit(name, LearningSite(target=target, examples=7))
    unbroken = finish()
    # As if the ServerApp had been killed in round 3; the sites' own state is their trainers'.
    for round_ in (3, 4):
        shutil.rmtree(house.folder.path / "rounds" / f"{round_:04d}")
    second = house.folder.latest()
    assert second is not None
    assert second.memory
    for name, site in house.sites.items():
        # What its trainer kept of round 2, whose instruction it answered from this state.
        site.gradient = _gradient_of_round(house, name, 2)
    resumed = finish()
    assert save(resumed.adapter) == save(unbroken.adapter)
    assert save(resumed.memory) == save(unbroken.memory)
    for site in house.sites.values():
        for again, once in zip(site.controls[4:], site.controls[2:4], strict=True):
            assert save(again) == save(once)


def _gradient_of_round(house: House, name: str, round_: int) -> Adapter:
    """A site's control variate after a round, from the adapter that it was sent."""
    folder = house.folder.path / "rounds" / f"{round_ - 1:04d}"
    adapter = load_file(folder / "adapter.safetensors")
    config = house.folder.config()
    if not config.training.control_variates:
        return {}
    names = [n for n in adapter if config.aggregation.method != "ffa" or n == B]
    target = house.sites[name].target
    return {n: 2 * ((target - adapter[n]) / 2).astype(np.float32) for n in names}


def test_sites_are_sent_the_mean_of_their_gradients(house: House) -> None:
    house.folder = RunFolder.create(
        house.tmp_path / "runs", config_of("scaffold on fedavg", rounds=2)
    )
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=3.0))
    federate(house.folder, house.exchange(), 2, None)
    first, second = house.sites["a"].controls
    assert not np.any(first[B])
    # B starts at 0, so the gradients of the first round are 1 and 3.
    np.testing.assert_allclose(second[B], 2.0)


def test_an_update_without_its_control_variate_is_refused(house: House) -> None:
    house.folder = RunFolder.create(
        house.tmp_path / "runs", config_of("scaffold on fedavg", rounds=1)
    )
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=1.0))

    class Old(LearningSite):
        """A release that knows no control variates."""

        def perform(
            self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
        ) -> pb.Description | pb.Update:
            update = super().perform(header, config, body)
            if isinstance(update, pb.Update):
                update.ClearField("control")
            return update

    house.admit("old", Old(target=1.0))
    checkpoint = federate(house.folder, house.exchange(), 3, None)
    assert checkpoint.round == 1
    lines = (house.folder.path / "metrics.jsonl").read_text().splitlines()
    (line,) = [line for line in lines if '"site": "old"' in line and '"outcome"' in line]
    assert '"outcome": "invalid"' in line
    np.testing.assert_allclose(checkpoint.memory[f"control/{B}"], 2 / 3 * 1.0)


def test_the_rate_has_a_default_of_its_own_for_each_optimizer() -> None:
    assert ServerOptimizerConfig(name="momentum").rate == 1.0
    assert ServerOptimizerConfig(name="adam").rate == 0.01
    named = {"model": {"base": "t"}, "server_optimizer": {"name": "momentum", "learning_rate": 3}}
    assert validate(RunConfig, named, "t").server_optimizer.rate == 3
