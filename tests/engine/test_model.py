from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from fedqlora.adapter import Adapter
from fedqlora.config import ModelConfig
from fedqlora.engine.data import Tokenized
from fedqlora.engine.loss import plan_batches, sum_losses
from fedqlora.engine.model import BaseModel, base_digest, resolve_base
from fedqlora.engine.train import mean_loss
from fedqlora.errors import ModelError, UpdateError
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load

Start = Callable[[BaseModel], Adapter]


def gradients(base: BaseModel, examples: list[Tokenized]) -> dict[str, torch.Tensor]:
    base.model.train()
    for batch in plan_batches(base, examples, TrainingConfig()):
        sum_losses(base, batch).backward()
    found = {}
    for name, parameter in base.trainable().items():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad.clone(), None
    return found


def test_a_decoder_is_loaded_as_causal_and_says_so(
    llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedqlora"):
        base = load(llama_folder)
    assert base.family == "causal"
    assert "LlamaForCausalLM, nf4, float32 on" in caplog.text


def test_an_encoder_decoder_is_loaded_as_seq2seq(t5: BaseModel) -> None:
    assert t5.family == "seq2seq"
    assert type(t5.model.get_base_model()).__name__ == "T5ForConditionalGeneration"


def test_nf4_with_double_quantization_covers_every_linear_layer_but_the_head(
    llama: BaseModel,
) -> None:
    layers = [m for m in llama.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.support_avx512bf16_for_cpu is False


def test_unquantized_is_unquantized(llama_folder: Path) -> None:
    base = load(llama_folder, nf4=False)
    assert not [m for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_only_the_adapter_is_trainable(llama: BaseModel) -> None:
    names = [n for n, p in llama.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2
    assert all(".lora_" in name for name in names)


def test_adapter_names_are_pefts_own(llama: BaseModel) -> None:
    shapes = dict(llama.spec().shapes)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert shapes[name] == (4, 64)
    assert shapes[name.replace("lora_A", "lora_B")] == (64, 4)
    assert list(shapes) == sorted(shapes)


def test_an_adapter_comes_back_as_it_was_set(llama: BaseModel, start: Start) -> None:
    adapter = {name: value + 0.25 for name, value in start(llama).items()}
    llama.set_adapter(adapter)
    back = llama.get_adapter()
    assert all(np.array_equal(back[name], adapter[name]) for name in adapter)
    back[next(iter(back))][:] = 9
    assert all(np.array_equal(value, adapter[n]) for n, value in llama.get_adapter().items())


def test_an_adapter_of_another_shape_is_refused(llama: BaseModel, start: Start) -> None:
    adapter = start(llama)
    first = next(iter(adapter))
    with pytest.raises(UpdateError, match="has shape"):
        llama.set_adapter({**adapter, first: adapter[first][:1]})


def test_two_loads_with_the_same_adapter_are_the_same_model(
    llama: BaseModel, llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    other = load(llama_folder)
    assert base_digest(other.folder) == base_digest(llama.folder)
    assert other.frozen_digest() == llama.frozen_digest()
    config = TrainingConfig()
    assert mean_loss(other, start(other), examples, config) == mean_loss(
        llama, start(llama), examples, config
    )


def test_a_missing_target_is_named(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM lacks: qkv, out"):
        load(llama_folder, targets=("q_proj", "qkv", "out"))


def test_a_target_that_cannot_carry_an_adapter_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot carry the adapter"):
        load(llama_folder, targets=("input_layernorm",))


def test_dora_magnitudes_are_given_and_do_not_change(llama_folder: Path, start: Start) -> None:
    base = load(llama_folder, targets=("q_proj",), dora=True)
    given = base.given()
    assert len(given) == 2
    base.set_adapter({name: value + 1 for name, value in start(base).items()})
    assert all(np.array_equal(value, given[name]) for name, value in base.given().items())
    weight = load(llama_folder, nf4=False, targets=("q_proj",), dora=True)
    norms = weight.model.get_base_model().model.layers[0].self_attn.q_proj.weight.norm(dim=1)
    first = next(value for name, value in weight.given().items() if "layers.0." in name)
    np.testing.assert_allclose(first, norms.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_an_evaluation_leaves_base_and_gradients_as_they_were(
    llama_folder: Path, start: Start, examples: list[Tokenized], compute_dtype: str
) -> None:
    base = BaseModel.load(
        llama_folder,
        ModelConfig.model_validate({"base": "tiny", "compute_dtype": compute_dtype}),
        LoraConfig(rank=4),
    )
    adapter = {name: value + np.float32(0.01) for name, value in start(base).items()}
    base.set_adapter(adapter)
    digest, before = base.frozen_digest(), gradients(base, examples)
    mean_loss(base, adapter, examples, TrainingConfig())
    assert base.frozen_digest() == digest
    after = gradients(base, examples)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_frozen_digest_sees_one_changed_4_bit_code(llama_folder: Path) -> None:
    base = load(llama_folder)
    before = base.frozen_digest()
    layer = next(m for m in base.model.modules() if isinstance(m, bnb.nn.Linear4bit))
    layer.weight.data[0] ^= 1
    assert base.frozen_digest() != before


def test_the_base_digest_depends_on_weights_config_and_tokenizer(
    llama_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    digest = base_digest(llama_folder)
    (copy / "README.md").write_text("nothing that matters")
    assert base_digest(copy) == digest
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert base_digest(copy) != digest
        (copy / name).write_bytes(content)
    assert base_digest(copy) == digest


def test_weights_that_are_not_safetensors_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama_folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(copy)
    with pytest.raises(ModelError, match="safetensors"):
        base_digest(copy)


def test_a_folder_under_models_is_found_by_name(llama_folder: Path) -> None:
    assert resolve_base("tiny-llama", llama_folder.parent) == llama_folder


def test_a_base_outside_the_models_folder_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leaves the models folder"):
        resolve_base(str(llama_folder), tmp_path)


def test_a_base_that_is_nowhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder under"):
        resolve_base("no such model", tmp_path)
