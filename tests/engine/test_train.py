from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedqlora.adapter import Adapter, add, norm
from fedqlora.engine.data import Tokenized
from fedqlora.engine.gradients import check_gradients
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import Trained, learning_rate, mean_loss, train
from fedqlora.errors import DataError, ModelError
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load

Start = Callable[[BaseModel], Adapter]
CONFIG = TrainingConfig(steps=3, batch_examples=4, learning_rate=1e-2)


def run(
    base: BaseModel,
    adapter: Adapter,
    examples: list[Tokenized],
    config: TrainingConfig = CONFIG,
    *,
    seed: int = 1,
    site: str = "a",
    round_: int = 1,
) -> Trained:
    return train(base, adapter, examples, config, seed=seed, site=site, round_=round_, rounds=4)


def same(one: Adapter, other: Adapter) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_reports_what_it_did(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    adapter = start(llama)
    before = mean_loss(llama, adapter, examples, CONFIG)
    config = TrainingConfig(steps=20, batch_examples=12, learning_rate=1e-2)
    trained = run(llama, adapter, examples, config)
    assert mean_loss(llama, add(adapter, trained.delta), examples, config) < 0.7 * before
    assert trained.examples == 20 * 12
    assert trained.tokens == 20 * 12 * 3
    assert trained.loss < before
    assert trained.step_seconds > 0


def test_a_t5_learns(t5: BaseModel, start: Start, examples: list[Tokenized]) -> None:
    adapter = start(t5)
    config = TrainingConfig(steps=20, batch_examples=12, learning_rate=1e-2)
    before = mean_loss(t5, adapter, examples, config)
    trained = run(t5, adapter, examples, config)
    assert mean_loss(t5, add(adapter, trained.delta), examples, config) < 0.7 * before


def test_a_recurrent_model_learns_without_packing(
    mamba_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load(mamba_folder, nf4=False, targets=("in_proj",))
    adapter = start(base)
    trained = run(base, adapter, examples)
    after = mean_loss(base, add(adapter, trained.delta), examples, CONFIG)
    assert after < mean_loss(base, adapter, examples, CONFIG)


def test_the_same_inputs_give_the_same_delta_to_the_bit(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load(llama_folder, dropout=0.1)
    first = run(base, start(base), examples)
    run(base, start(base), examples, round_=2)
    torch.manual_seed(99)
    assert same(run(base, start(base), examples).delta, first.delta)


def test_seed_site_and_round_each_change_the_data(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    config = CONFIG.model_copy(update={"schedule": "constant"})
    adapter = start(llama)
    first = run(llama, adapter, examples, config)
    assert not same(run(llama, adapter, examples, config, seed=2).delta, first.delta)
    assert not same(run(llama, adapter, examples, config, site="b").delta, first.delta)
    assert not same(run(llama, adapter, examples, config, round_=2).delta, first.delta)


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_an_accumulated_batch_equals_one_batch(
    llama: BaseModel, t5_folder: Path, start: Start, examples: list[Tokenized], family: str
) -> None:
    base = llama
    if family == "seq2seq":
        base = load(t5_folder)
    uneven = [Tokenized(e.prompt, e.completion[: 1 + i % 3]) for i, e in enumerate(examples)]
    whole = TrainingConfig(steps=1, batch_examples=12, learning_rate=1e-3)
    parts = whole.model_copy(update={"microbatch_tokens": 64})
    one = run(base, start(base), uneven, whole)
    many = run(base, start(base), uneven, parts)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    # AdamW's first step divides by the gradient's size: compare what was not rounding noise.
    for name in one.delta:
        close = np.isclose(one.delta[name], many.delta[name], atol=1e-5)
        assert close.mean() > 0.99


def test_gradient_checkpointing_changes_nothing_but_memory(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    plain = run(llama, start(llama), examples)
    less = run(
        llama, start(llama), examples, CONFIG.model_copy(update={"gradient_checkpointing": True})
    )
    assert less.loss == pytest.approx(plain.loss, rel=1e-6)
    assert same(run(llama, start(llama), examples).delta, plain.delta)


def test_a_second_round_loads_and_quantizes_nothing(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    addresses = [p.data_ptr() for p in llama.model.parameters()]
    digest = llama.frozen_digest()
    trained = run(llama, start(llama), examples)
    run(llama, add(start(llama), trained.delta), examples, round_=2)
    assert [p.data_ptr() for p in llama.model.parameters()] == addresses
    assert llama.frozen_digest() == digest


def test_the_schedule_runs_over_all_rounds() -> None:
    config = TrainingConfig(steps=10, learning_rate=1.0, schedule="linear", warmup_steps=0)
    assert [learning_rate(config, step, 40) for step in (0, 10, 20, 39)] == pytest.approx(
        [1.0, 0.75, 0.5, 0.025]
    )
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert [learning_rate(cosine, step, 40) for step in (0, 20)] == pytest.approx([1.0, 0.5])
    constant = config.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 39, 40) == 1.0


def test_warm_up_rises_to_the_peak() -> None:
    config = TrainingConfig(learning_rate=1.0, schedule="linear", warmup_steps=3)
    assert [learning_rate(config, step, 13) for step in range(5)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.9]
    )


def test_a_later_round_takes_smaller_steps(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    first = norm(run(llama, start(llama), examples).delta)
    last = norm(run(llama, start(llama), examples, round_=4).delta)
    assert last < 0.5 * first


def test_a_fresh_adapter_whose_A_has_no_gradient_yet_is_accepted(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    trained = run(llama, start(llama), examples, TrainingConfig(steps=1, batch_examples=2))
    assert all(np.any(value) == (".lora_B." in name) for name, value in trained.delta.items())


def test_a_module_with_only_zero_gradients_is_named() -> None:
    names = [f"m.{module}.lora_{factor}.weight" for module in "pq" for factor in "AB"]
    gradients: dict[str, torch.Tensor | None] = {
        name: torch.full((2,), 1.0 if name == "m.p.lora_B.weight" else 0.0) for name in names
    }
    with pytest.raises(ModelError, match=r"the adapter on m\.q gets only zero"):
        check_gradients(gradients)
    for bad in (torch.tensor([math.nan, 0.0]), None):
        gradients["m.p.lora_A.weight"] = bad
        with pytest.raises(ModelError, match=r"m\.p\.lora_A\.weight gets no finite"):
            check_gradients(gradients)


def test_a_layer_that_the_loss_does_not_reach_stops_the_round(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load(llama_folder, nf4=False)
    attention = base.model.get_base_model().model.layers[1].self_attn
    attention.register_forward_hook(lambda _m, _a, out: (out[0].detach(), *out[1:]))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj"):
        run(base, start(base), examples)


def test_a_site_without_completions_is_refused(llama: BaseModel, start: Start) -> None:
    with pytest.raises(DataError, match="completion to learn"):
        run(llama, start(llama), [Tokenized((), (5,))])


def test_the_loss_of_nothing_is_not_a_number(llama: BaseModel, start: Start) -> None:
    assert math.isnan(mean_loss(llama, start(llama), [], CONFIG))


def test_a_proximal_term_keeps_a_site_nearer_to_its_start(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    plain = run(llama, start(llama), examples)
    assert same(run(llama, start(llama), examples, CONFIG).delta, plain.delta)
    pulled = run(llama, start(llama), examples, CONFIG.model_copy(update={"proximal": 100.0}))
    assert norm(pulled.delta) < 0.8 * norm(plain.delta)
    # At the start there is no distance to pull back over.
    one = CONFIG.model_copy(update={"steps": 1, "schedule": "constant"})
    first = run(llama, start(llama), examples, one)
    held = run(llama, start(llama), examples, one.model_copy(update={"proximal": 100.0}))
    assert same(held.delta, first.delta)


def correct(
    base: BaseModel, adapter: Adapter, examples: list[Tokenized], correction: Adapter, steps: int
) -> Trained:
    config = CONFIG.model_copy(update={"steps": steps, "schedule": "constant"})
    return train(
        base, adapter, examples, config,
        seed=1, site="a", round_=1, rounds=1, correction=correction,
    )  # fmt: skip


def test_the_mean_gradient_is_uncorrected_and_a_correction_by_its_opposite_stops_the_site(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    adapter = add(start(llama), run(llama, start(llama), examples).delta)
    nothing = {name: np.zeros_like(value) for name, value in adapter.items()}
    plain = correct(llama, adapter, examples, nothing, 1)
    assert plain.gradient.keys() == adapter.keys()
    assert norm(plain.gradient) > 0
    assert norm(plain.delta) > 0
    opposite = {name: -value for name, value in plain.gradient.items()}
    stopped = correct(llama, adapter, examples, opposite, 1)
    assert same(stopped.gradient, plain.gradient)
    assert norm(stopped.delta) < 1e-3 * norm(plain.delta)
    # Over two steps it is the mean of both.
    two = correct(llama, adapter, examples, nothing, 2)
    assert not same(two.gradient, plain.gradient)
    assert 0.2 * norm(plain.gradient) < norm(two.gradient) < 2 * norm(plain.gradient)


def test_no_correction_gives_no_gradient(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    assert run(llama, start(llama), examples).gradient == {}
