"""Each family's adapter: which layers carry it, whose gradients are exact, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from fedqlora.adapter import Adapter, norm
from fedqlora.engine.architectures import ARCHITECTURES, Architecture, architecture_of
from fedqlora.engine.data import Tokenized
from fedqlora.engine.dp import check_exactness, unit_gradients
from fedqlora.engine.lora import add_adapter
from fedqlora.engine.model import BaseModel
from fedqlora.engine.prompts import encode_prompts
from fedqlora.engine.train import mean_loss, train
from fedqlora.errors import ModelError, PrivacyError
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load
from tests.engine.test_dp import alone, uneven, warm
from tests.tiny_models import SETTINGS, save_tiny

Start = Callable[[BaseModel], Adapter]
CONFIG = TrainingConfig(steps=1, batch_examples=4, microbatch_tokens=512, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of each family, made when it is first asked for."""
    made = tmp_path_factory.mktemp("families")

    def folder(model_type: str) -> Path:
        path = made / model_type
        return path if path.exists() else save_tiny(model_type, path)

    return folder


def layers_of(base: BaseModel) -> set[str]:
    return {name.partition(".lora_")[0] for name, _ in base.spec().shapes}


def test_every_listed_architecture_has_a_tiny_model() -> None:
    assert set(SETTINGS) == set(ARCHITECTURES)
    assert architecture_of("of tomorrow") == Architecture()


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "unquantized"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_each_patients_gradient_is_that_of_its_examples_one_at_a_time(
    folders: Callable[[str], Path],
    start: Start,
    examples: list[Tokenized],
    model_type: str,
    nf4: bool,
) -> None:
    base = warm(load(folders(model_type), nf4=nf4), start)
    base.model.train()
    texts = uneven(examples[:6])
    units = [texts[:1], texts[1:4], texts[4:]]
    together, _ = unit_gradients(base, units, CONFIG)
    for place, unit in enumerate(units):
        expected = alone(base, unit)
        size = norm({name: value.numpy() for name, value in expected.items()})
        for name, value in expected.items():
            assert (together[name][place] - value).norm() <= 1e-5 * size, name
    check_exactness(base, CONFIG)
    assert base.separable


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("mamba", {"lm_head", "x_proj", "dt_proj", "out_proj"}),
        ("mamba2", {"lm_head", "out_proj"}),
        ("zamba2", {"lm_head", "out_proj"}),
        ("jamba", {"lm_head"}),
        ("t5", {"lm_head", "wo"}),
    ],
)
def test_what_cannot_be_4_bit_stays_as_it_was(
    folders: Callable[[str], Path], model_type: str, kept: set[str]
) -> None:
    base = load(folders(model_type), rank=2, targets=("q" if model_type == "t5" else "in_proj",))
    linear = {
        name.removesuffix(".base_layer").rpartition(".")[2]: module
        for name, module in base.model.get_base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }
    plain = {name for name, module in linear.items() if not isinstance(module, bnb.nn.Linear4bit)}
    assert plain == kept


def test_fused_experts_stay_out_of_4_bits_and_without_an_adapter(
    folders: Callable[[str], Path],
) -> None:
    for model_type in ("mixtral", "qwen3_next", "jamba"):
        base = load(folders(model_type))
        experts = {
            name: parameter
            for name, parameter in base.model.named_parameters()
            if ".experts." in name
        }
        assert experts
        assert all(p.is_floating_point() and p.ndim == 3 for p in experts.values())
        assert not any(".experts" in name for name in layers_of(base))


def test_targets_of_ones_own_replace_the_familys(folders: Callable[[str], Path]) -> None:
    base = load(folders("jamba"), targets=("self_attn.q_proj",))
    assert layers_of(base) == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_all_linear_means_every_linear_layer_but_the_head(folders: Callable[[str], Path]) -> None:
    base = load(folders("mixtral"), targets="all-linear")
    assert layers_of(base) == layers_of(load(folders("mixtral")))
    more = layers_of(load(folders("jamba"), targets="all-linear")) - layers_of(
        load(folders("jamba"))
    )
    assert {name.rpartition(".")[2] for name in more} == {"x_proj", "dt_proj", "out_proj"}


@pytest.mark.parametrize(
    ("model_type", "targets", "sentence"),
    [
        ("mamba", ("out_proj",), "Module 'out_proj' is incompatible"),
        ("mixtral", ("experts",), r"layers\.0\.mlp\.experts is a MixtralExperts"),
        (
            "qwen3_next",
            ("gate_proj", "up_proj"),
            r"layers\.0\.mlp\.experts is a fused block of experts",
        ),
        ("gpt2", ("ln_1",), r"transformer\.h\.0\.ln_1 is a LayerNorm"),
        ("llama", ("q_proj", "lm_head"), "lm_head is the output head"),
        ("rwkv", ("q_proj",), "RwkvForCausalLM lacks: q_proj"),
    ],
)
def test_a_target_that_cannot_carry_an_adapter_is_named(
    folders: Callable[[str], Path], model_type: str, targets: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        load(folders(model_type), targets=targets)


def test_an_lstm_is_refused_by_name(folders: Callable[[str], Path]) -> None:
    model = load(folders("llama")).model.get_base_model()
    model.memory = torch.nn.LSTM(64, 64)
    with pytest.raises(ModelError, match="memory is a LSTM, which cannot carry the adapter"):
        add_adapter(model, LoraConfig(targets=("memory",)), "causal")


def test_an_adapter_that_the_loss_does_not_reach_stops_the_round_and_is_named(
    folders: Callable[[str], Path], start: Start, examples: list[Tokenized]
) -> None:
    base = load(folders("mamba"), nf4=False, targets=("in_proj", "dt_proj"))
    with pytest.raises(ModelError, match=r"layers\.0\.mixer\.dt_proj\.lora_A.* no finite gradient"):
        train(base, start(base), examples, CONFIG, seed=1, site="a", round_=1, rounds=1)
    with pytest.raises(ModelError, match=r"layers\.0\.mixer\.dt_proj gets only zero"):
        check_exactness(warm(base, start), CONFIG)


def test_a_layer_that_sees_all_tokens_of_a_batch_is_refused_in_a_private_run_by_name(
    folders: Callable[[str], Path], start: Start
) -> None:
    base = warm(load(folders("qwen3_next"), targets=("shared_expert_gate",)), start)
    with pytest.raises(PrivacyError, match=r"mlp\.shared_expert_gate does not see the examples"):
        check_exactness(base, CONFIG)


def test_an_rwkv_is_not_rescaled_for_inference(
    folders: Callable[[str], Path], start: Start, examples: list[Tokenized]
) -> None:
    for nf4 in (True, False):
        base = load(folders("rwkv"), nf4=nf4)
        digest = base.frozen_digest()
        adapter = {name: value + np.float32(0.05) for name, value in start(base).items()}
        held_out = mean_loss(base, adapter, examples[:3], CONFIG)
        assert base.frozen_digest() == digest
        # The loss of training, where nothing is ever rescaled; all have three completion tokens.
        base.model.train()
        _, summed = unit_gradients(base, [[example] for example in examples[:3]], CONFIG)
        assert held_out == pytest.approx(summed / 3, rel=1e-4)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_prompts_scored_together_have_the_logits_of_each_alone(
    folders: Callable[[str], Path], start: Start, model_type: str
) -> None:
    base = warm(load(folders(model_type)), start)
    base.model.eval()
    prompts = [(5, 6, 7, 8, 9), (10, 11), (12,)]
    owners, paths = [2, 0, 0], [(20,), (21, 22, 23), (24, 25)]
    with torch.inference_mode(), base.computing():
        batch = encode_prompts(base.model, base.family, prompts, 0)
        first, after = batch.first(), batch.after(owners, paths)
        for index, prompt in enumerate(prompts):
            close(first[index], next_logits(base, prompt, ()))
        for row, (owner, path) in enumerate(zip(owners, paths, strict=True)):
            for depth in range(len(path)):
                alone = next_logits(base, prompts[owner], path[: depth + 1])
                close(after[row, depth], alone)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def next_logits(base: BaseModel, prompt: tuple[int, ...], path: tuple[int, ...]) -> torch.Tensor:
    """Logits (V) after a prompt and a path: one row, no cache, no padding."""
    if base.family == "causal":
        ids = torch.tensor([[*prompt, *path]])
        return base.model(input_ids=ids, use_cache=False).logits[0, -1]
    decoded = torch.tensor([[base.model.config.decoder_start_token_id, *path]])
    output = base.model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=decoded, use_cache=False
    )
    return output.logits[0, -1]
