"""What only a GPU shows: NF4 kernels, bfloat16 autocast, paged 8-bit AdamW, packing on CUDA.

`make test-gpu` runs them. Each compares CUDA with the CPU or with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedqlora.adapter import Adapter, add, norm
from fedqlora.config import ModelConfig
from fedqlora.engine.architectures import ARCHITECTURES
from fedqlora.engine.data import Tokenized
from fedqlora.engine.dp import check_exactness, sum_clipped
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import mean_loss, train
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.gpu

Start = Callable[[BaseModel], Adapter]
CONFIG = TrainingConfig(steps=20, batch_examples=12, learning_rate=1e-2)


def load_on(device: str, folder: Path, *, nf4: bool = True, dtype: str = "float32") -> BaseModel:
    model = ModelConfig.model_validate(
        {
            "base": folder.name,
            "quantization": "nf4" if nf4 else "none",
            "compute_dtype": dtype,
        }
    )
    return BaseModel.load(folder, model, LoraConfig(rank=4), torch.device(device))


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_base_learns_and_stays_the_same(
    llama_folder: Path,
    t5_folder: Path,
    start: Start,
    examples: list[Tokenized],
    family: str,
    dtype: str,
) -> None:
    base = load_on("cuda", llama_folder if family == "llama" else t5_folder, dtype=dtype)
    digest = base.frozen_digest()
    adapter = start(base)
    before = mean_loss(base, adapter, examples, CONFIG)
    trained = train(base, adapter, examples, CONFIG, seed=1, site="a", round_=1, rounds=4)
    assert mean_loss(base, add(adapter, trained.delta), examples, CONFIG) < 0.8 * before
    assert base.frozen_digest() == digest


@pytest.mark.parametrize("nf4", [True, False])
def test_the_loss_is_that_of_the_cpu(
    llama_folder: Path, start: Start, examples: list[Tokenized], nf4: bool
) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        base = load_on(device, llama_folder, nf4=nf4)
        losses.append(mean_loss(base, start(base), examples, CONFIG))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_packed_examples_do_not_see_each_other(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load_on("cuda", llama_folder)
    packed = CONFIG.model_copy(update={"packing": True})
    single = CONFIG.model_copy(update={"packing": False, "microbatch_tokens": 16})
    together = mean_loss(base, start(base), examples, packed)
    assert together == pytest.approx(mean_loss(base, start(base), examples, single), rel=1e-4)


def test_a_second_round_loads_and_quantizes_nothing(
    llama_folder: Path, start: Start, examples: list[Tokenized]
) -> None:
    base = load_on("cuda", llama_folder)
    addresses = [parameter.data_ptr() for parameter in base.model.parameters()]
    first = train(base, start(base), examples, CONFIG, seed=1, site="a", round_=1, rounds=2)
    after = add(start(base), first.delta)
    second = train(base, after, examples, CONFIG, seed=1, site="a", round_=2, rounds=2)
    assert norm(second.delta) > 0
    assert [parameter.data_ptr() for parameter in base.model.parameters()] == addresses
    assert all(np.isfinite(value).all() for value in second.delta.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("nf4", [True, False])
def test_a_base_spread_over_two_gpus_trains_as_on_one(
    llama_folder: Path, start: Start, examples: list[Tokenized], nf4: bool
) -> None:
    whole = load_on("cuda", llama_folder, nf4=nf4)
    size = sum(parameter.nbytes for parameter in whole.model.parameters())
    spread = BaseModel.load(
        llama_folder,
        ModelConfig.model_validate(
            {"base": "tiny", "quantization": "nf4" if nf4 else "none", "compute_dtype": "float32"}
        ),
        LoraConfig(rank=4),
        torch.device("cuda", 0),
        {0: size, 1: 4 * size},
    )
    assert len(spread.gpus) == 2
    losses = [mean_loss(base, start(base), examples, CONFIG) for base in (whole, spread)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for base in (whole, spread):
        done = train(base, start(base), examples, CONFIG, seed=1, site="a", round_=1, rounds=1)
        losses.append(done.loss)
    assert losses[3] == pytest.approx(losses[2], rel=1e-2)
    check_exactness(spread, CONFIG)
    total, _ = sum_clipped(spread, [[example] for example in examples], CONFIG, 1.0)
    assert all(bool(value.isfinite().all()) for value in total.values())


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "unquantized"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_each_family_learns(
    tmp_path: Path, start: Start, examples: list[Tokenized], model_type: str, nf4: bool
) -> None:
    base = load_on("cuda", save_tiny(model_type, tmp_path / model_type), nf4=nf4)
    digest = base.frozen_digest()
    adapter = start(base)
    before = mean_loss(base, adapter, examples, CONFIG)
    trained = train(base, adapter, examples, CONFIG, seed=1, site="a", round_=1, rounds=4)
    assert mean_loss(base, add(adapter, trained.delta), examples, CONFIG) < before
    check_exactness(base, CONFIG)
    assert base.frozen_digest() == digest
