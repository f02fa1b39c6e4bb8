"""Configuration: one clear sentence for each wrong file."""

from pathlib import Path

import pytest

from fedqlora.config import RunConfig, load_run, validate
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
