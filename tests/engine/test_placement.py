"""A base spread over GPUs: where its layers go, and that hooks between them change nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model

from fedqlora.adapter import Adapter
from fedqlora.engine.data import Tokenized
from fedqlora.engine.device import add_device_options, open_devices
from fedqlora.engine.lora import add_adapter
from fedqlora.engine.model import BaseModel
from fedqlora.engine.placement import ROOM, place
from fedqlora.engine.pretrained import load_checkpoint
from fedqlora.engine.train import Trained, train
from fedqlora.errors import ConfigError, ModelError
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load

GIB = 2**30
# Llama 2 7B: 32 blocks of 202 M values, embedding and head of 131 M each.
SEVEN_BILLION = transformers.AutoConfig.for_model("llama")


def place_7b(memory: dict[int, int], *, quantized: bool) -> dict[str, int]:
    return place(
        transformers.AutoModelForCausalLM, SEVEN_BILLION, memory,
        dtype=torch.bfloat16, quantized=quantized, unquantized=(),
    )  # fmt: skip


@pytest.mark.parametrize(("quantized", "gib"), [(True, 4), (False, 12)])
def test_blocks_go_whole_and_in_order_to_gpus_of_about_the_same_load(
    quantized: bool, gib: int
) -> None:
    placed = place_7b({0: gib * GIB, 1: gib * GIB}, quantized=quantized)
    blocks = [placed[f"model.layers.{number}"] for number in range(32)]
    assert blocks == sorted(blocks)
    assert 10 <= blocks.count(0) <= 22
    assert placed["model.embed_tokens"] == 0
    assert placed["lm_head"] == 1


def test_a_larger_gpu_gets_more() -> None:
    placed = place_7b({0: 6 * GIB, 1: 18 * GIB}, quantized=False)
    assert 4 <= [placed[f"model.layers.{n}"] for n in range(32)].count(0) <= 10


def test_a_base_in_4_bits_fits_where_it_does_not_in_16() -> None:
    memory = {0: 4 * GIB, 1: 4 * GIB}
    assert place_7b(memory, quantized=True)
    # 6.74 billion values of two bytes.
    room = f"its GPUs have {8 * ROOM:.1f} GiB for them, so model.layers."
    with pytest.raises(ModelError, match=rf"needs 12\.6 GiB for its weights and {room}"):
        place_7b(memory, quantized=False)


def test_hooks_between_layers_leave_the_delta_as_it_was(
    llama_folder: Path, start: Callable[[BaseModel], Adapter], examples: list[Tokenized]
) -> None:
    config = TrainingConfig(steps=2, batch_examples=4, learning_rate=1e-2)

    def trained(base: BaseModel) -> Trained:
        return train(base, start(base), examples, config, seed=1, site="a", round_=1, rounds=1)

    cpu = torch.device("cpu")
    model, tokenizer, family = load_checkpoint(
        llama_folder, dtype=torch.float32, device=cpu, quantized=False
    )
    # What transformers does with a map over GPUs; here all its places are the CPU.
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.rotary_emb": "cpu"}
    dispatch_model(model, device_map=places, force_hooks=True)
    assert hasattr(model.model.layers[1], "_hf_hook")
    tuned = add_adapter(model, LoraConfig(rank=4), family)
    spread = BaseModel(tuned, tokenizer, family, llama_folder, cpu, torch.float32)
    one, other = trained(load(llama_folder, nf4=False)).delta, trained(spread).delta
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has several GPUs")
def test_spreading_over_gpus_that_are_not_there_is_refused() -> None:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    with pytest.raises(ConfigError, match=r"--shard spreads .* this process sees [01]; give"):
        open_devices(parser.parse_args(["--shard"]))
    assert open_devices(parser.parse_args(["--device", "cpu"])) == (torch.device("cpu"), None)
