"""Policy: every rule refuses by its name."""

from pathlib import Path

import pytest

from client.policy import (
    Apps,
    Limits,
    Metrics,
    Models,
    Policy,
    check,
    load_policy,
    own_training,
    training_rank,
)
from fedqlora.config import RunConfig, validate
from fedqlora.errors import ConfigError, PolicyRefusal

DIGEST = "d" * 64
APP = "a" * 64
POLICY = Policy(models=Models(digests=(DIGEST,)), limits=Limits(rank=8, steps=10, rounds=4))


def config(**sections: dict[str, object]) -> RunConfig:
    return validate(RunConfig, {"model": {"base": "tiny"}, **sections}, "run.toml")


def test_a_run_at_the_limits_is_allowed() -> None:
    asked = config(lora={"rank": 8}, training={"steps": 10}, federation={"rounds": 4})
    check(POLICY, asked, 4, DIGEST, APP)


@pytest.mark.parametrize(
    ("asked", "round_", "digest", "rule"),
    [
        (config(), 1, "e" * 64, "models.digests"),
        (config(lora={"rank": 9}), 1, DIGEST, "limits.rank"),
        (config(training={"steps": 11}), 1, DIGEST, "limits.steps"),
        (config(federation={"rounds": 5}), 1, DIGEST, "limits.rounds"),
        (config(), 5, DIGEST, "limits.rounds"),
    ],
)
def test_a_run_outside_the_policy_is_refused_by_rule(
    asked: RunConfig, round_: int, digest: str, rule: str
) -> None:
    with pytest.raises(PolicyRefusal, match=rule) as caught:
        check(POLICY, asked, round_, digest, APP)
    assert caught.value.rule == rule


@pytest.mark.parametrize("claimed", ["b" * 64, ""], ids=["another", "none"])
def test_a_coordinator_that_claims_another_app_than_those_approved_is_refused(claimed: str) -> None:
    check(POLICY, config(), 1, DIGEST, claimed)
    approved = POLICY.model_copy(update={"apps": Apps(digests=(APP,))})
    check(approved, config(), 1, DIGEST, APP)
    with pytest.raises(PolicyRefusal, match=r"says that it runs \(apps\.digests\)") as caught:
        check(approved, config(), 1, DIGEST, claimed)
    assert caught.value.rule == "apps.digests"


def test_what_comes_down_to_lie_frozen_is_not_counted_as_what_leaves() -> None:
    asked = config(lora={"rank": 8}, aggregation={"residual_rank": 4000})
    check(POLICY, asked, 1, DIGEST, APP)


def test_a_higher_rank_trains_at_the_policys_where_the_run_mixes_ranks() -> None:
    asked = config(lora={"rank": 64, "mixed_ranks": True})
    check(POLICY, asked, 1, DIGEST, APP)
    assert training_rank(POLICY, asked) == 8
    assert training_rank(POLICY, config(lora={"rank": 4, "mixed_ranks": True})) == 4


def test_a_weighting_by_a_withheld_count_is_refused() -> None:
    silent = POLICY.model_copy(update={"metrics": Metrics(allowed=())})
    with pytest.raises(PolicyRefusal, match=r"metrics\.allowed"):
        check(silent, config(), 1, DIGEST, APP)
    check(silent, config(aggregation={"weighting": "uniform"}), 1, DIGEST, APP)


def test_a_policy_must_approve_a_model_and_know_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[models]\ndigests = []\n")
    with pytest.raises(ConfigError, match=r"models\.digests"):
        load_policy(path)
    path.write_text(f'[models]\ndigests = ["{DIGEST}"]\n[limits]\nrnk = 3\n')
    with pytest.raises(ConfigError, match="did you mean rank"):
        load_policy(path)
    path.write_text(f'[models]\ndigests = ["{DIGEST}"]\n[metrics]\nallowed = ["texts"]\n')
    with pytest.raises(ConfigError, match=r"metrics\.allowed"):
        load_policy(path)


def test_fewer_steps_are_trained_where_both_sides_agree_to_that() -> None:
    asked = config(training={"steps": 19})
    agreed = config(training={"steps": 19, "fewer_steps": True})
    with pytest.raises(PolicyRefusal, match=r"allows 10, the run asks for 19 \(limits.steps\)"):
        check(POLICY, asked, 1, DIGEST, APP)
    check(POLICY, agreed, 1, DIGEST, APP)
    assert own_training(POLICY, agreed.training).steps == 10
    fewer = config(training={"steps": 4, "fewer_steps": True}).training
    assert own_training(POLICY, fewer).steps == 4
    assert own_training(POLICY, asked.training).steps == 19
