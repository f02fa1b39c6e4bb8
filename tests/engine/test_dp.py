"""Private steps: what a unit may contribute, and that no one else's gradient is in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor

from fedqlora.adapter import A_PART, B_PART, Adapter, norm
from fedqlora.engine.data import Tokenized
from fedqlora.engine.dp import check_exactness, sum_clipped, train_privately, unit_gradients
from fedqlora.engine.lora import RESIDUAL, named_tensors
from fedqlora.engine.loss import plan_batches, sum_losses
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import set_checkpointing
from fedqlora.errors import PrivacyError
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load

Start = Callable[[BaseModel], Adapter]
CONFIG = TrainingConfig(steps=1, learning_rate=1e-2, microbatch_tokens=256)


def warm(base: BaseModel, start: Start) -> BaseModel:
    """An adapter whose B is not zero, so that A has gradients too."""
    generator = np.random.default_rng(0)
    base.set_adapter(
        {
            name: value + generator.normal(0, 0.05, value.shape).astype(np.float32)
            for name, value in start(base).items()
        }
    )
    return base


def alone(base: BaseModel, unit: list[Tokenized]) -> dict[str, Tensor]:
    """A unit's gradient by plain autograd, one example at a time: what is to be equalled."""
    parameters = base.trainable()
    for example in unit:
        (batch,) = plan_batches(base, [example], CONFIG.model_copy(update={"packing": False}))
        loss = sum_losses(base, batch) / len(batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def residual_of(base: BaseModel) -> Adapter:
    """What exact_svd would send beside the adapter, of another rank than its own."""
    generator = np.random.default_rng(7)
    return {
        name: generator.normal(0, 0.05, [6 if n == 4 else n for n in shape]).astype(np.float32)
        for name, shape in base.spec().shapes
    }


def half_of(base: BaseModel, part: str) -> list[str]:
    return [name for name, _ in base.spec().shapes if part in name]


def uneven(examples: list[Tokenized]) -> list[Tokenized]:
    return [Tokenized(e.prompt, e.completion[: 1 + i % 3]) for i, e in enumerate(examples)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "unquantized"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_patients_gradient_is_that_of_its_examples_one_at_a_time(
    family: str,
    nf4: bool,
    checkpointing: bool,
    request: pytest.FixtureRequest,
    start: Start,
    examples: list[Tokenized],
) -> None:
    base = load(request.getfixturevalue(f"{family}_folder"), nf4=nf4)
    warm(base, start).model.train()
    set_checkpointing(base, checkpointing)
    texts = uneven(examples)
    units = [texts[:1], texts[1:4], texts[4:5], texts[5:]]
    together, _ = unit_gradients(base, units, CONFIG)
    for place, unit in enumerate(units):
        expected = alone(base, unit)
        # Some gradients are zero but for rounding: a decoder of one token has one key to look at.
        size = norm({name: value.numpy() for name, value in expected.items()})
        for name, value in expected.items():
            assert (together[name][place] - value).norm() <= 1e-5 * size, name


@pytest.mark.parametrize("part", [A_PART, B_PART])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_where_one_half_trains_beside_a_residual_each_patients_gradient_is_that_halfs_alone(
    family: str,
    part: str,
    request: pytest.FixtureRequest,
    start: Start,
    examples: list[Tokenized],
) -> None:
    base = load(request.getfixturevalue(f"{family}_folder"))
    adapter = warm(base, start).get_adapter()
    texts = uneven(examples)
    units = [texts[:1], texts[1:4], texts[4:]]
    base.set_adapter(adapter, None, half_of(base, part))
    without, _ = unit_gradients(base, units, CONFIG)
    base.set_adapter(adapter, residual_of(base), half_of(base, part))
    together, _ = unit_gradients(base, units, CONFIG)
    assert list(together) == half_of(base, part)
    for place, unit in enumerate(units):
        expected = alone(base, unit)
        size = norm({name: value.numpy() for name, value in expected.items()})
        for name, value in expected.items():
            assert (together[name][place] - value).norm() <= 1e-5 * size, name
        # The residual is in the forward pass: without it these are other gradients.
        assert any((without[n][place] - g).norm() > 1e-3 * size for n, g in expected.items())


@pytest.mark.parametrize("part", [A_PART, B_PART])
def test_where_one_half_trains_one_patient_more_moves_that_half_by_at_most_the_clip_norm(
    llama: BaseModel, start: Start, examples: list[Tokenized], part: str
) -> None:
    adapter = warm(llama, start).get_adapter()
    units, added = [examples[:2], examples[2:9]], examples[9:]
    sizes = []
    for trained in (None, half_of(llama, part)):
        llama.set_adapter(adapter, None, trained)
        share, _ = unit_gradients(llama, [added], CONFIG)
        sizes.append(math.sqrt(sum(float(g.square().sum()) for g in share.values())))
    whole, size = sizes
    clip_norm = size / 2
    before, _ = sum_clipped(llama, units, CONFIG, clip_norm)
    after, _ = sum_clipped(llama, [*units, added], CONFIG, clip_norm)
    assert list(after) == half_of(llama, part)
    move = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in after))
    # The norm is taken of what trains: of everything the same patient would be cut down further.
    assert whole > size
    assert move == pytest.approx(clip_norm, rel=1e-3)


@pytest.mark.parametrize("part", [A_PART, B_PART])
def test_the_half_that_does_not_train_and_the_residual_stay_as_they_were_sent(
    llama: BaseModel, start: Start, examples: list[Tokenized], part: str
) -> None:
    adapter = warm(llama, start).get_adapter()
    beside, names = residual_of(llama), half_of(llama, part)
    result = train_privately(
        llama, adapter, [[e] for e in examples], CONFIG, clip_norm=1.0, noise_multiplier=1.0,
        sampling_rate=0.5, round_=1, rounds=1, residual=beside, trained=names,
    )  # fmt: skip
    after = llama.get_adapter()
    assert list(result.delta) == names
    assert all(value.any() for value in result.delta.values())
    for name in after.keys() - set(names):
        np.testing.assert_array_equal(after[name], adapter[name])
    for name, tensor in named_tensors(llama.model, RESIDUAL).items():
        np.testing.assert_array_equal(tensor.detach().numpy(), beside[name])


def test_a_layer_that_mixes_the_rows_is_refused_also_where_one_half_trains(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load(llama_folder, nf4=False)
    mlp = base.model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda _m, _a, out: out + out.mean(0, keepdim=True))
    with pytest.raises(PrivacyError, match="does not keep the examples of a batch apart"):
        train_privately(
            base, start(base), [[e] for e in examples], CONFIG, clip_norm=1.0,
            noise_multiplier=1.0, sampling_rate=0.5, round_=1, rounds=1,
            trained=half_of(base, B_PART),
        )  # fmt: skip


def test_the_length_of_one_example_leaves_anothers_gradient_alone(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    warm(llama, start)
    first, second = examples[0], examples[1]
    short = Tokenized(second.prompt, second.completion[:1])
    one, _ = unit_gradients(llama, [[first], [second]], CONFIG)
    other, _ = unit_gradients(llama, [[first], [short]], CONFIG)
    for name in one:
        assert torch.allclose(one[name][0], other[name][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.01, 1.0])
def test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm(
    llama: BaseModel, start: Start, examples: list[Tokenized], clip_norm: float
) -> None:
    warm(llama, start)
    units = [examples[:2], examples[2:3], examples[3:9]]
    added = examples[9:]
    before, _ = sum_clipped(llama, units, CONFIG, clip_norm)
    after, _ = sum_clipped(llama, [*units, added], CONFIG, clip_norm)
    move = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in after))
    assert move <= clip_norm * (1 + 1e-4)
    # It does move: unclipped, this patient's share is larger than the smaller bound.
    share, _ = unit_gradients(llama, [added], CONFIG)
    size = math.sqrt(sum(float(g.square().sum()) for g in share.values()))
    assert size > 0.01
    assert move == pytest.approx(min(size, clip_norm), rel=1e-3)


def test_a_patient_too_large_for_one_pass_is_still_clipped_as_one(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    warm(llama, start)
    small = CONFIG.model_copy(update={"microbatch_tokens": 64})
    whole, _ = sum_clipped(llama, [examples], CONFIG, 1e-3)
    parts, _ = sum_clipped(llama, [examples], small, 1e-3)
    assert norm({n: v.numpy() for n, v in parts.items()}) == pytest.approx(1e-3, rel=1e-4)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-8)


def test_a_gradient_that_is_not_finite_counts_as_zero(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = warm(load(llama_folder, nf4=False), start)
    embedding = base.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[70 % len(embedding)] = float("nan")
    poisoned = Tokenized((70 % len(embedding), 5), (6, 1))
    clean = [e for e in examples if 70 % len(embedding) not in e.prompt + e.completion]
    expected, _ = sum_clipped(base, [[clean[0]]], CONFIG, 1.0)
    found, _ = sum_clipped(base, [[clean[0]], [poisoned]], CONFIG, 1.0)
    for name in expected:
        assert torch.isfinite(found[name]).all()
        assert torch.allclose(found[name], expected[name], atol=1e-6)


def private(base: BaseModel, start: Start, units: list[list[Tokenized]], **how: float) -> Adapter:
    values = {"clip_norm": 1.0, "noise_multiplier": 1.0, "sampling_rate": 0.5, **how}
    return train_privately(base, start(base), units, CONFIG, round_=1, rounds=2, **values).delta  # type: ignore[arg-type]


def test_a_step_without_a_patient_adds_noise_all_the_same(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    delta = private(llama, start, [[e] for e in examples], sampling_rate=1e-9)
    assert all(np.isfinite(value).all() and value.any() for value in delta.values())


def test_two_rounds_from_the_same_state_have_different_noise(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    units = [[e] for e in examples]
    one, other = (private(llama, start, units) for _ in range(2))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_without_noise_a_private_step_learns(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    units = [[e] for e in examples]
    config = CONFIG.model_copy(update={"steps": 15})
    before = train_privately(
        llama, start(llama), units, config,
        clip_norm=10.0, noise_multiplier=0.0, sampling_rate=1.0, round_=1, rounds=1,
    )  # fmt: skip
    _, first = sum_clipped(llama, units, config, 10.0)
    llama.set_adapter(start(llama))
    _, untrained = sum_clipped(llama, units, config, 10.0)
    assert first < 0.8 * untrained
    assert before.examples == 15 * len(examples)


def test_a_layer_that_joins_the_rows_is_named_and_refused(llama_folder: Path, start: Start) -> None:
    base = load(llama_folder, nf4=False)
    mlp = base.model.get_base_model().model.layers[1].mlp
    forward = mlp.forward
    # As a mixture of experts does: all rows' tokens in one list.
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view(x.shape)
    with pytest.raises(PrivacyError, match=r"layers\.1\.mlp\.\w+ does not see the examples"):
        check_exactness(warm(base, start), CONFIG)


def test_a_layer_that_mixes_the_rows_is_refused(llama_folder: Path, start: Start) -> None:
    base = load(llama_folder, nf4=False)
    mlp = base.model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda _m, _a, out: out + out.mean(0, keepdim=True))
    with pytest.raises(PrivacyError, match="does not keep the examples of a batch apart"):
        check_exactness(warm(base, start), CONFIG)


def test_batch_normalisation_is_refused_by_name(llama_folder: Path) -> None:
    base = load(llama_folder, nf4=False)
    base.model.get_base_model().model.layers[0].bad = torch.nn.BatchNorm1d(4)
    with pytest.raises(PrivacyError, match=r"layers\.0\.bad joins the examples"):
        check_exactness(base, CONFIG)


def test_dora_is_refused_by_name(llama_folder: Path, examples: list[Tokenized]) -> None:
    base = load(llama_folder, nf4=False, dora=True)
    with pytest.raises(PrivacyError, match=r"lora_magnitude_vector.* lora\.dora = false"):
        unit_gradients(base, [examples], CONFIG)


def test_an_adapter_shared_by_two_layers_is_refused_by_name(
    llama_folder: Path, examples: list[Tokenized]
) -> None:
    base = load(llama_folder, nf4=False)
    layers = base.model.get_base_model().model.layers
    layers[1].mlp.gate_proj.lora_A["default"].weight = (
        layers[0].mlp.gate_proj.lora_A["default"].weight
    )
    with pytest.raises(PrivacyError, match=r"layers\.0\.mlp\.gate_proj.* shared by 2 layers"):
        unit_gradients(base, [examples], CONFIG)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opacus_finds_the_same_gradients(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = warm(load(llama_folder), start)
    texts = examples[:4]
    ours, _ = unit_gradients(base, [[e] for e in texts], CONFIG)
    wrapped = GradSampleModule(base.model, strict=False, loss_reduction="sum")
    config = CONFIG.model_copy(update={"packing": False})
    (batch,) = plan_batches(base, texts, config)
    # Each of these examples has three completion tokens: the sum over three is its mean.
    loss = sum_losses(base, batch) / 3
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in base.trainable().items():
        for row, index in enumerate(batch.rows):
            theirs = parameter.grad_sample[row]
            assert (ours[name][index] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name
    wrapped.remove_hooks()
