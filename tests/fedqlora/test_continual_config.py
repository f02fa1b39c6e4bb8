"""Continual learning in a run's configuration: which settings are refused together, and why."""

from __future__ import annotations

from typing import Any

import pytest

from fedqlora.config import RunConfig, validate
from fedqlora.errors import ConfigError

CHAIN = {"earlier": ["first"], "task": "second"}
PRIVATE = {
    "privacy": {"unit": "example", "epsilon": 4.0},
    "training": {"packing": False},
    "data": {"validation_fraction": 0},
    "aggregation": {"method": "fedavg", "weighting": "uniform"},
}


def make(continual: dict[str, object], **sections: Any) -> RunConfig:
    values = {"model": {"base": "tiny"}, "continual": continual, **sections}
    return validate(RunConfig, values, "run.toml")


def with_method(method: str, **more: object) -> dict[str, object]:
    return {"method": method, **more}


@pytest.mark.parametrize(
    "setting",
    [{"replay_fraction": 0.1}, {"penalty": 0.1}, {"orthogonal": True}, {"max_forgetting": 0.1}],
)
def test_what_keeps_earlier_tasks_needs_an_earlier_task(setting: dict[str, object]) -> None:
    sections = {"aggregation": with_method("ffa"), "evaluation": {"enabled": True}}
    with pytest.raises(ConfigError, match=r"this run continues none; start it by `make continue"):
        make(setting, **sections)
    make({**CHAIN, **setting}, **sections)


def test_a_task_is_learned_once() -> None:
    with pytest.raises(ConfigError, match="names a task that was learned before"):
        make({"earlier": ["first"], "task": "first"})
    with pytest.raises(ConfigError, match="names a task that was learned before"):
        make({"earlier": ["run"]})  # the run's name is its task where it names none


@pytest.mark.parametrize("method", ["exact_svd", "fedsvd", "rolora"])
def test_orthogonal_rows_go_with_an_a_that_is_kept(method: str) -> None:
    with pytest.raises(ConfigError, match=r'continual.orthogonal .*method = "ffa"'):
        make({**CHAIN, "orthogonal": True}, aggregation=with_method(method))
    for kept in ("ffa", "fedavg"):
        make({**CHAIN, "orthogonal": True}, aggregation=with_method(kept))


@pytest.mark.parametrize(
    "sections",
    [
        {"aggregation": with_method("fedavg", rule="median")},
        {
            "aggregation": with_method("fedavg"),
            "server_optimizer": {"name": "adam"},
        },
    ],
)
def test_orthogonal_rows_do_not_survive_changes_of_single_values(
    sections: dict[str, dict[str, object]],
) -> None:
    with pytest.raises(ConfigError, match="holds for sums of A"):
        make({**CHAIN, "orthogonal": True}, **sections)
    still = {**sections, "aggregation": {**sections["aggregation"], "method": "ffa"}}
    make({**CHAIN, "orthogonal": True}, **still)


def test_a_penalty_does_not_hold_what_is_frozen() -> None:
    with pytest.raises(ConfigError, match=r"orthogonal freezes what continual.penalty"):
        make({**CHAIN, "orthogonal": True, "penalty": 1.0}, aggregation=with_method("ffa"))


@pytest.mark.parametrize("setting", [{"penalty": 0.1}, {"orthogonal": True}], ids=str)
def test_private_steps_keep_earlier_tasks_by_replay_only(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"privacy.unit .*replay_fraction instead"):
        make({**CHAIN, **setting}, **PRIVATE)
    make({**CHAIN, "replay_fraction": 0.1}, **PRIVATE)


def test_private_steps_go_on_beside_what_an_earlier_task_left_frozen() -> None:
    make({**CHAIN, "frozen_rank": 4}, **PRIVATE)


@pytest.mark.parametrize(
    "setting", [{"penalty": 0.1}, {"orthogonal": True}, {"frozen_rank": 4}], ids=str
)
def test_no_product_holds_what_dora_learned(setting: dict[str, object]) -> None:
    sections = {"aggregation": with_method("fedavg"), "lora": {"dora": True}}
    with pytest.raises(ConfigError, match=r"lora.dora is not linear in B A"):
        make({**CHAIN, **setting}, **sections)
    make({**CHAIN, "replay_fraction": 0.1}, **sections)


@pytest.mark.parametrize("bound", ["max_forgetting", "max_general_loss"])
def test_a_bound_needs_somebody_who_scores(bound: str) -> None:
    with pytest.raises(ConfigError, match=r"which nobody computes; set evaluation.enabled"):
        make({**CHAIN, bound: 0.1}, evaluation={"probe": True})
    make({**CHAIN, bound: 0.1}, evaluation={"probe": True, "enabled": True})


def test_a_bound_on_plain_questions_needs_them_asked() -> None:
    with pytest.raises(ConfigError, match=r"set evaluation.probe = true"):
        make({**CHAIN, "max_general_loss": 0.1}, evaluation={"enabled": True})


def test_a_frozen_adapter_is_allowed_for_by_its_rank() -> None:
    assert make({}, aggregation=with_method("ffa")).residual_rank == 0
    assert make({**CHAIN, "frozen_rank": 12}, aggregation=with_method("ffa")).residual_rank == 12
    assert make({**CHAIN, "frozen_rank": 12}).residual_rank == 32, "exact_svd has its own"
