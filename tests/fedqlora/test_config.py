"""Configuration: one clear sentence for each wrong file."""

from pathlib import Path

import pytest

from fedqlora.combinations import COMBINATIONS
from fedqlora.config import LoraConfig, RunConfig, load_run, validate
from fedqlora.errors import ConfigError

GOOD = {"model": {"base": "tiny"}}


def test_defaults_fill_everything_but_the_base_model() -> None:
    config = validate(RunConfig, GOOD, "run.toml")
    assert config.model.quantization == "nf4"
    assert config.lora.rank == 8
    assert config.federation.rounds == 4


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "run.toml: model is missing; add it"),
        ({**GOOD, "lora": {"rnk": 4}}, "run.toml: lora.rnk is not a known key; did you mean rank?"),
        ({**GOOD, "modle": {}}, "run.toml: modle is not a known key; did you mean model?"),
        (
            {**GOOD, "lora": {"rank": 0}},
            "run.toml: lora.rank is wrong: input should be greater than or equal to 1",
        ),
        (
            {**GOOD, "codec": {"update": "topk", "topk_fraction": 0}},
            "run.toml: codec.topk_fraction is wrong: "
            "input should be greater than or equal to 0.001",
        ),
        (
            {**GOOD, "codec": {"update": "int4"}},
            "run.toml: codec.update is wrong: "
            "input should be 'bfloat16', 'float32', 'int8', 'nf4' or 'topk'",
        ),
        (
            {**GOOD, "federation": {"min_sites": 3, "expected_sites": 2}},
            "run.toml: federation is wrong: expected_sites is smaller than min_sites; "
            "raise it or lower min_sites",
        ),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, values, "run.toml")
    assert str(caught.value) == sentence


def test_overrides_win_over_the_file_and_are_validated(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "tiny"\n[federation]\nrounds = 2\n')
    config = load_run(path, {"federation.rounds": 6, "lora.rank": 4})
    assert (config.federation.rounds, config.lora.rank) == (6, 4)
    with pytest.raises(ConfigError, match="did you mean rounds"):
        load_run(path, {"federation.round": 6})


def test_a_missing_file_and_broken_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_run(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_run(broken)


def test_a_configuration_survives_its_json_form() -> None:
    config = validate(RunConfig, {**GOOD, "lora": {"targets": ["q_proj"]}}, "run.toml")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("method", ["exact_svd", "fedsvd", "ffa", "rolora"])
def test_dora_goes_with_fedavg_only(method: str) -> None:
    dora = {**GOOD, "lora": {"dora": True}, "aggregation": {"method": method}}
    with pytest.raises(ConfigError, match=r'lora.dora .*method = "fedavg"'):
        validate(RunConfig, dora, "run.toml")
    validate(RunConfig, {**dora, "aggregation": {"method": "fedavg"}}, "run.toml")


@pytest.mark.parametrize("method", ["fedavg", "rolora", "ffa", "fedsvd"])
def test_mixed_ranks_go_with_exact_svd_only(method: str) -> None:
    mixed = {**GOOD, "lora": {"mixed_ranks": True}, "aggregation": {"method": method}}
    with pytest.raises(ConfigError, match=r'lora.mixed_ranks .*method = "exact_svd"'):
        validate(RunConfig, mixed, "run.toml")
    validate(RunConfig, {**mixed, "aggregation": {"method": "exact_svd"}}, "run.toml")


@pytest.mark.parametrize("method", ["fedavg", "rolora", "ffa", "fedsvd"])
def test_a_residual_rank_goes_with_exact_svd_only(method: str) -> None:
    ranked = {**GOOD, "aggregation": {"method": method, "residual_rank": 4}}
    with pytest.raises(ConfigError, match=r"residual_rank .* keeps nothing; leave it out"):
        validate(RunConfig, ranked, "run.toml")
    assert validate(RunConfig, {**GOOD, "aggregation": {"method": method}}, "t").residual_rank == 0


@pytest.mark.parametrize("method", ["exact_svd", "fedsvd", "rolora"])
def test_error_feedback_goes_with_factors_that_stay_the_same_only(method: str) -> None:
    kept = {**GOOD, "codec": {"update": "nf4"}, "aggregation": {"method": method}}
    with pytest.raises(ConfigError, match=r"codec.error_feedback .*error_feedback = false"):
        validate(RunConfig, kept, "run.toml")
    validate(RunConfig, {**kept, "codec": {"update": "nf4", "error_feedback": False}}, "run.toml")
    validate(RunConfig, {**kept, "aggregation": {"method": "ffa"}}, "run.toml")


@pytest.mark.parametrize("update", ["int8", "nf4", "topk"])
def test_mixed_ranks_go_with_encodings_that_say_the_rank_only(update: str) -> None:
    codec = {"update": update, "error_feedback": False}
    mixed = {**GOOD, "lora": {"mixed_ranks": True}, "codec": codec}
    with pytest.raises(ConfigError, match=r'codec.update .*update = "bfloat16"'):
        validate(RunConfig, mixed, "run.toml")
    validate(RunConfig, {**mixed, "codec": {"update": "float32"}}, "run.toml")


PRIVATE = {
    **GOOD,
    "privacy": {"unit": "example", "epsilon": 4.0},
    "training": {"packing": False},
    "data": {"validation_fraction": 0},
    "aggregation": {"method": "fedavg", "weighting": "uniform"},
}


@pytest.mark.parametrize("method", ["exact_svd", "ffa", "fedsvd", "rolora"])
def test_privacy_goes_with_fedavg_only(method: str) -> None:
    validate(RunConfig, PRIVATE, "run.toml")
    other = {**PRIVATE, "aggregation": {"method": method, "weighting": "uniform"}}
    with pytest.raises(ConfigError, match=r'privacy.unit .*method = "fedavg"'):
        validate(RunConfig, other, "run.toml")


def test_privacy_does_not_go_with_fewer_steps() -> None:
    fewer = {**PRIVATE, "training": {"packing": False, "fewer_steps": True}}
    with pytest.raises(ConfigError, match=r"privacy.unit .*fewer_steps = false"):
        validate(RunConfig, fewer, "run.toml")


SECURE: dict[str, dict[str, object]] = {
    **GOOD,
    "secure_aggregation": {"enabled": True},
    "aggregation": {"method": "ffa"},
    "federation": {"min_sites": 3},
}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"aggregation": {}}, r'needs each by itself; set aggregation.method = "ffa"'),
        ({"codec": {"update": "topk"}}, r'topk sends other positions .*update = "bfloat16"'),
        ({"codec": {"update": "int8"}}, r'another for each block .*update = "bfloat16"'),
        ({"codec": {"update": "nf4"}}, r'another for each block .*update = "bfloat16"'),
        ({"federation": {}}, r"tells each of two the other's update; .*at least 3"),
        ({"federation": {"min_sites": 3, "expected_sites": 51}}, r"built for up to 50; lower"),
        ({"federation": {"min_sites": 51}}, r"built for up to 50; lower"),
        (
            {
                "training": {"steps": 5000, "batch_examples": 100},
                "aggregation": {"method": "ffa", "weighting": "tokens"},
            },
            r'sums weights in 31 bits, .*weighting = "examples"',
        ),
    ],
)
def test_what_secure_aggregation_does_not_go_with_is_one_sentence(
    sections: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"secure_aggregation .*{sentence}"):
        validate(RunConfig, {**SECURE, **sections}, "run.toml")


@pytest.mark.parametrize("method", ["fedavg", "ffa", "fedsvd", "rolora"])
def test_secure_aggregation_goes_with_methods_that_take_a_mean(method: str) -> None:
    for update in ("bfloat16", "float32"):
        sections = {"aggregation": {"method": method}, "codec": {"update": update}}
        assert validate(RunConfig, {**SECURE, **sections}, "t").secure_aggregation.enabled


def test_mixed_ranks_do_not_go_with_secure_aggregation() -> None:
    """Their method is refused first, so the row is asked by itself."""
    mixed = {"lora": {"mixed_ranks": True}, "aggregation": {"method": "exact_svd"}}
    run = validate(RunConfig, {**GOOD, **mixed}, "run.toml")
    secure = run.secure_aggregation.model_copy(update={"enabled": True})
    masked = run.model_copy(update={"secure_aggregation": secure})
    sentences = [row.sentence for row in COMBINATIONS if row.is_asked_for(masked)]
    assert any(one.endswith("set lora.mixed_ranks = false") for one in sentences)
    assert not any(row.is_asked_for(run) for row in COMBINATIONS)


def test_secure_aggregation_goes_with_privacy() -> None:
    both = {**PRIVATE, "secure_aggregation": {"enabled": True}, "federation": {"min_sites": 3}}
    assert validate(RunConfig, both, "run.toml").most_weight == 1


def test_every_refused_combination_has_a_case_above() -> None:
    """A new row needs a test of its own: this one fails until it is counted."""
    assert len(COMBINATIONS) == 16


def test_exact_svd_is_the_default_and_keeps_four_times_the_rank() -> None:
    config = validate(RunConfig, {**GOOD, "lora": {"rank": 6}}, "run.toml")
    assert (config.aggregation.method, config.residual_rank) == ("exact_svd", 24)
    own = {**GOOD, "aggregation": {"residual_rank": 0}}
    assert validate(RunConfig, own, "run.toml").residual_rank == 0


def test_an_unknown_method_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"aggregation.method is wrong: .*'exact_svd', 'fedavg'"):
        validate(RunConfig, {**GOOD, "aggregation": {"method": "fedaverage"}}, "run.toml")


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_keeps_the_scale(rslora: bool) -> None:
    lora = LoraConfig(rank=9, alpha=18, rslora=rslora)
    assert lora.scale == (6 if rslora else 2)
    assert lora.at_rank(4).scale == pytest.approx(lora.scale)
    assert lora.at_rank(9) is lora
