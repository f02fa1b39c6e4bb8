"""Configuration: one clear sentence for each wrong file."""

from pathlib import Path

import pytest

from fedqlora.combinations import COMBINATIONS
from fedqlora.config import RunConfig, load_run, validate
from fedqlora.errors import ConfigError
from fedqlora.lora_config import LoraConfig

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


@pytest.mark.parametrize("method", ["exact_svd", "fedavg", "ffa", "fedsvd", "rolora"])
def test_privacy_goes_with_every_method(method: str) -> None:
    aggregation = {"method": method, "weighting": "uniform"}
    validate(RunConfig, {**PRIVATE, "aggregation": aggregation}, "run.toml")


def test_privacy_goes_with_homomorphic_encryption() -> None:
    encrypted = {
        **PRIVATE,
        "aggregation": {"method": "ffa", "weighting": "uniform"},
        "federation": {"min_sites": 3},
        "homomorphic_encryption": {"enabled": True, "key_site": "b"},
    }
    validate(RunConfig, encrypted, "run.toml")


def test_privacy_does_not_go_with_fewer_steps() -> None:
    fewer = {**PRIVATE, "training": {"packing": False, "fewer_steps": True}}
    with pytest.raises(ConfigError, match=r"privacy.unit .*fewer_steps = false"):
        validate(RunConfig, fewer, "run.toml")


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_single_values_are_no_rule_for_rebuilt_products(rule: str) -> None:
    sites = {"min_sites": 3}
    ruled = {**GOOD, "aggregation": {"rule": rule}, "federation": sites}
    with pytest.raises(ConfigError, match=r'exact_svd averages products .*method = "fedavg"'):
        validate(RunConfig, ruled, "run.toml")
    for method in ("fedavg", "ffa", "fedsvd", "rolora"):
        other = {**ruled, "aggregation": {"rule": rule, "method": method}}
        validate(RunConfig, other, "run.toml")


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
def test_krum_needs_twice_the_malicious_sites_and_three(rule: str) -> None:
    aggregation = {"rule": rule, "malicious_sites": 2}
    ruled = {**GOOD, "aggregation": aggregation, "federation": {"min_sites": 6}}
    with pytest.raises(ConfigError, match=r"2 f \+ 3 updates in every round; raise"):
        validate(RunConfig, ruled, "run.toml")
    validate(RunConfig, {**ruled, "federation": {"min_sites": 7}}, "run.toml")


def test_a_trimmed_mean_needs_one_site_more_than_it_leaves_out() -> None:
    aggregation = {"rule": "trimmed_mean", "method": "fedavg", "malicious_sites": 2}
    ruled = {**GOOD, "aggregation": aggregation, "federation": {"min_sites": 4}}
    with pytest.raises(ConfigError, match=r"needs 2 f \+ 1 in every round; raise"):
        validate(RunConfig, ruled, "run.toml")
    validate(RunConfig, {**ruled, "federation": {"min_sites": 5}}, "run.toml")


@pytest.mark.parametrize(
    ("method", "name"),
    [("exact_svd", "adam"), ("exact_svd", "yogi")]
    + [("fedsvd", name) for name in ("momentum", "adam", "yogi")],
)
def test_moments_of_values_do_not_go_with_factors_made_anew(method: str, name: str) -> None:
    optimized = {**GOOD, "server_optimizer": {"name": name}, "aggregation": {"method": method}}
    with pytest.raises(ConfigError, match=r"server_optimizer keeps moments .*momentum"):
        validate(RunConfig, optimized, "run.toml")
    for other in ("fedavg", "ffa"):
        validate(RunConfig, {**optimized, "aggregation": {"method": other}}, "run.toml")


def test_momentum_of_products_goes_with_exact_svd() -> None:
    validate(RunConfig, {**GOOD, "server_optimizer": {"name": "momentum"}}, "run.toml")


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi"])
def test_no_optimizer_moves_the_half_that_rolora_holds_still(name: str) -> None:
    optimized = {**GOOD, "server_optimizer": {"name": name}, "aggregation": {"method": "rolora"}}
    with pytest.raises(ConfigError, match="the half of the adapter that rolora holds still"):
        validate(RunConfig, optimized, "run.toml")


SCAFFOLD = {**GOOD, "training": {"control_variates": True}, "aggregation": {"method": "fedavg"}}


@pytest.mark.parametrize("method", ["exact_svd", "fedsvd"])
def test_control_variates_do_not_go_with_factors_made_anew(method: str) -> None:
    validate(RunConfig, SCAFFOLD, "run.toml")
    with pytest.raises(ConfigError, match=r"control_variates .* makes anew each round"):
        validate(RunConfig, {**SCAFFOLD, "aggregation": {"method": method}}, "run.toml")


def test_control_variates_do_not_go_with_alternate_halves() -> None:
    with pytest.raises(ConfigError, match=r"control_variates .* rolora does not train in the"):
        validate(RunConfig, {**SCAFFOLD, "aggregation": {"method": "rolora"}}, "run.toml")


@pytest.mark.parametrize("update", ["int8", "nf4", "topk"])
def test_control_variates_travel_in_plain_encodings_only(update: str) -> None:
    with pytest.raises(ConfigError, match=r'control_variates .*update = "bfloat16"'):
        validate(RunConfig, {**SCAFFOLD, "codec": {"update": update}}, "run.toml")
    validate(RunConfig, {**SCAFFOLD, "codec": {"update": "float32"}}, "run.toml")


@pytest.mark.parametrize("rule", ["median", "geometric_median", "norm_clipping"])
def test_control_variates_do_not_go_with_sites_that_lie(rule: str) -> None:
    aggregation = {"method": "fedavg", "rule": rule}
    with pytest.raises(ConfigError, match=r"control_variates .* one that lies would steer all"):
        validate(RunConfig, {**SCAFFOLD, "aggregation": aggregation}, "run.toml")


@pytest.mark.parametrize("training", [{"control_variates": True}, {"proximal": 0.1}])
def test_privacy_goes_with_plain_steps_only(training: dict[str, object]) -> None:
    private = {**PRIVATE, "training": {"packing": False, **training}}
    with pytest.raises(ConfigError, match=r"privacy.unit takes clipped, noised steps only"):
        validate(RunConfig, private, "run.toml")


CANARY = {**GOOD, "aggregation": {"canary": 0.1}, "evaluation": {"enabled": True}}


def test_a_canary_needs_somebody_who_computes_losses() -> None:
    validate(RunConfig, CANARY, "run.toml")
    with pytest.raises(ConfigError, match=r"canary .* set evaluation.enabled = true"):
        validate(RunConfig, {**CANARY, "evaluation": {}}, "run.toml")


def test_nobody_is_excluded_without_a_canary() -> None:
    with pytest.raises(ConfigError, match=r"exclude_after counts rounds that aggregation.canary"):
        validate(RunConfig, {**GOOD, "aggregation": {"exclude_after": 1}}, "run.toml")


def test_a_round_whose_gradients_sites_keep_cannot_be_set_back() -> None:
    aggregation = {"method": "fedavg", "canary": 0.1}
    kept = {**CANARY, "aggregation": aggregation, "training": {"control_variates": True}}
    with pytest.raises(ConfigError, match=r"canary sets the centre back"):
        validate(RunConfig, kept, "run.toml")


@pytest.mark.parametrize("method", ["exact_svd", "fedsvd", "rolora"])
def test_a_late_update_is_of_factors_that_are_still_there_only(method: str) -> None:
    late = {**GOOD, "federation": {"late_updates": "use"}, "aggregation": {"method": method}}
    with pytest.raises(ConfigError, match=r'late_updates = "use" adds .*late_updates = "discard"'):
        validate(RunConfig, late, "run.toml")
    for other in ("fedavg", "ffa"):
        validate(RunConfig, {**late, "aggregation": {"method": other}}, "run.toml")


@pytest.mark.parametrize(
    ("federation", "said"),
    [
        ({"sample_sites": 2, "min_sites": 3}, "sample_sites is smaller than min_sites"),
        ({"sample_sites": 3, "sample_fraction": 0.5}, "both say how many; leave one out"),
    ],
)
def test_a_sample_has_one_size_that_is_enough(federation: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(RunConfig, {**GOOD, "federation": federation}, "run.toml")


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
        (
            {"aggregation": {"method": "ffa", "rule": "median"}},
            r'compares single ones; .*rule = "mean"',
        ),
        (
            {
                "aggregation": {"method": "ffa", "canary": 0.1},
                "evaluation": {"enabled": True},
            },
            r"could blame nobody",
        ),
        ({"training": {"control_variates": True}}, r"travel beside them in the clear"),
        (
            {"federation": {"min_sites": 3, "late_updates": "use"}},
            r'in no sum; set federation.late_updates = "discard"',
        ),
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
            r'sum weights in 31 bits, .*weighting = "examples"',
        ),
    ],
)
def test_what_secure_aggregation_does_not_go_with_is_one_sentence(
    sections: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"secure_aggregation .*{sentence}"):
        validate(RunConfig, {**SECURE, **sections}, "run.toml")


ENCRYPTED: dict[str, dict[str, object]] = {
    **GOOD,
    "homomorphic_encryption": {"enabled": True, "key_site": "b"},
    "aggregation": {"method": "ffa"},
    "federation": {"min_sites": 3},
}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"aggregation": {"method": "ffa", "rule": "median"}}, r'.*rule = "mean"'),
        (
            {"aggregation": {"method": "ffa", "canary": 0.1}, "evaluation": {"enabled": True}},
            r"could blame nobody",
        ),
        ({"training": {"control_variates": True}}, r"travel beside them in the clear"),
        ({"federation": {"min_sites": 3, "late_updates": "use"}}, r'.*late_updates = "discard"'),
        ({"codec": {"update": "topk"}}, r'.*update = "bfloat16"'),
        ({"codec": {"update": "nf4"}}, r'.*update = "bfloat16"'),
        ({"federation": {}}, r".*at least 3"),
        ({"federation": {"min_sites": 51}}, r"built for up to 50"),
        (
            {
                "training": {"steps": 5000, "batch_examples": 100},
                "aggregation": {"method": "ffa", "weighting": "tokens"},
            },
            r"sum weights in 31 bits",
        ),
        ({"secure_aggregation": {"enabled": True}}, r"enable one of them"),
        ({"aggregation": {"method": "fedavg"}}, r'B with a fixed A; set .*method = "ffa"'),
        ({"aggregation": {}}, r'B with a fixed A; set .*method = "ffa"'),
        ({"federation": {"min_sites": 3, "sample_sites": 3}}, r"a sample may lack it"),
        ({"federation": {"min_sites": 3, "sample_fraction": 0.5}}, r"a sample may lack it"),
        ({"homomorphic_encryption": {"enabled": True}}, r"never the coordinator; set key_site"),
    ],
)
def test_what_homomorphic_encryption_does_not_go_with_is_one_sentence(
    sections: dict[str, object], sentence: str
) -> None:
    validate(RunConfig, ENCRYPTED, "run.toml")
    with pytest.raises(ConfigError, match=f"homomorphic_encryption.*{sentence}"):
        validate(RunConfig, {**ENCRYPTED, **sections}, "run.toml")


UNIFORM = {"method": "fedavg", "weighting": "uniform"}
HIDDEN: dict[str, dict[str, object]] = {
    **GOOD,
    "site_privacy": {"epsilon": 4.0},
    "aggregation": UNIFORM,
    "federation": {"expected_sites": 30, "min_sites": 3},
}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"aggregation": {"weighting": "uniform"}}, r"exact_svd then takes products"),
        ({"aggregation": {**UNIFORM, "rule": "median"}}, r'takes none; set .*rule = "mean"'),
        ({"secure_aggregation": {"enabled": True}}, r"clips each update at the coordinator"),
        (
            {
                "aggregation": {"method": "ffa", "weighting": "uniform"},
                "homomorphic_encryption": {"enabled": True, "key_site": "b"},
            },
            r"clips each update at the coordinator",
        ),
        ({"aggregation": {"method": "fedavg"}}, r'set aggregation.weighting = "uniform"'),
        ({"federation": {}}, r"who takes part; set federation.expected_sites"),
        ({"federation": {"expected_sites": 29}}, r"leaves no signal.*few_sites = true"),
        (
            {"aggregation": {**UNIFORM, "canary": 0.1}, "evaluation": {"enabled": True}},
            r"sets rounds back because of one",
        ),
        ({"training": {"control_variates": True}}, r"mean gradient without noise"),
        ({"federation": {"expected_sites": 40, "sample_sites": 30}}, r"takes another's place"),
        ({"federation": {"expected_sites": 40, "sample_fraction": 0.5}}, r"takes another's place"),
        ({"continual": {"earlier": ["t"], "orthogonal": True}}, r"adds noise to A.*method = .ffa"),
    ],
)
def test_what_site_privacy_does_not_go_with_is_one_sentence(
    sections: dict[str, object], sentence: str
) -> None:
    validate(RunConfig, HIDDEN, "run.toml")
    with pytest.raises(ConfigError, match=f"site_privacy .*{sentence}"):
        validate(RunConfig, {**HIDDEN, **sections}, "run.toml")


def test_few_sites_are_an_explicit_wish() -> None:
    few = {"epsilon": 4.0, "few_sites": True}
    asked = {**HIDDEN, "site_privacy": few, "federation": {"expected_sites": 3}}
    assert validate(RunConfig, asked, "run.toml").site_privacy.enabled


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
    """A new row needs a test of its own, here or in test_continual_config.py: count it then."""
    assert len(COMBINATIONS) == 55


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
