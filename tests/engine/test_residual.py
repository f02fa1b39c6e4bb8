"""A frozen residual beside the trainable adapter: in training, scoring and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from fedqlora.adapter import Adapter, AdapterSpec, lower_rank
from fedqlora.config import RunConfig, validate
from fedqlora.engine.data import Record, Tokenized
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.export import merge
from fedqlora.engine.held_out import HeldOut
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import mean_loss, train
from fedqlora.errors import UpdateError
from fedqlora.halves import Method, select_trained
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig
from server.checkpoint import Checkpoint, Origin
from server.peft_format import join_residual, write_adapter
from tests.engine.conftest import load

Start = Callable[[BaseModel], Adapter]
CONFIG = TrainingConfig(steps=3, batch_examples=4, learning_rate=1e-2)
SCALE = LoraConfig(rank=4).scale


def random_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 0.1, shape).astype(np.float32) for n, shape in spec.shapes}


def run_round(
    base: BaseModel,
    adapter: Adapter,
    examples: list[Tokenized],
    residual: Adapter | None = None,
    method: Method = "exact_svd",
    round_: int = 1,
) -> Adapter:
    return train(
        base, adapter, examples, CONFIG, seed=1, site="a", round_=round_, rounds=2,
        residual=residual, trained=select_trained(adapter, method, round_),
    ).delta  # fmt: skip


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_and_residual_together_are_the_joined_adapter(
    llama_folder: Path, t5_folder: Path, examples: list[Tokenized], family: str, rslora: bool
) -> None:
    folder = llama_folder if family == "causal" else t5_folder
    base = load(folder, rslora=rslora)
    lora = LoraConfig(rank=4, rslora=rslora)
    adapter, residual = random_adapter(base.spec(), 1), random_adapter(base.spec().at_rank(6), 2)
    first = next(iter(residual))
    # Layers may differ in rank: this one has less than the others.
    residual[first] = residual[first][:2].copy()
    other = first.replace("lora_A", "lora_B")
    residual[other] = residual[other][:, :2].copy()
    both = mean_loss(base, adapter, examples, CONFIG, residual)
    wide = load(folder, **lora.at_rank(10).model_dump(exclude={"dropout", "targets"}))
    joined = join_residual(adapter, residual, lora.scale)
    assert both == pytest.approx(mean_loss(wide, joined, examples, CONFIG), rel=1e-5)
    assert abs(both - mean_loss(base, adapter, examples, CONFIG)) > 1e-3


def test_the_residual_is_gone_with_the_next_adapter_that_has_none(
    llama_folder: Path, examples: list[Tokenized]
) -> None:
    base = load(llama_folder)
    adapter, residual = random_adapter(base.spec(), 1), random_adapter(base.spec(), 2)
    alone = mean_loss(base, adapter, examples, CONFIG)
    for rank in (3, 5, 5):
        other = random_adapter(base.spec().at_rank(rank), rank)
        assert mean_loss(base, adapter, examples, CONFIG, other) != alone
        assert mean_loss(base, adapter, examples, CONFIG, residual) != alone
        assert mean_loss(base, adapter, examples, CONFIG) == alone


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_beside_a_residual_changes_the_adapter_alone(
    llama_folder: Path, examples: list[Tokenized], compute_dtype: str
) -> None:
    base = load(llama_folder)
    if compute_dtype == "bfloat16":
        base.compute_dtype = torch.bfloat16
    adapter, residual = random_adapter(base.spec(), 1), random_adapter(base.spec(), 2)
    base.set_adapter(adapter, residual)
    before = base.frozen_digest()
    trainable = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all(".default." in name for name in trainable)
    delta = run_round(base, adapter, examples, residual)
    assert all(value.any() for value in delta.values())
    assert base.frozen_digest() == before
    kept = peft.get_peft_model_state_dict(base.model, adapter_name="residual")
    assert all(np.array_equal(kept[name].numpy(), residual[name]) for name in residual)
    # It does take part: without it the same steps end elsewhere.
    alone = run_round(base, adapter, examples)
    assert any(not np.array_equal(delta[name], alone[name]) for name in delta)


def test_the_trainable_adapter_of_peft_alone_would_train_the_residual(llama_folder: Path) -> None:
    """Why the residual is frozen again: PEFT makes every active adapter trainable."""
    base = load(llama_folder)
    base.set_adapter(random_adapter(base.spec(), 1), random_adapter(base.spec(), 2))
    base.model.base_model.set_adapter(["default", "residual"])
    trainable = [n for n, p in base.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 * 2


@pytest.mark.parametrize(
    ("method", "round_", "half"),
    [("ffa", 1, "lora_B"), ("fedsvd", 2, "lora_B"), ("rolora", 1, "lora_B"),
     ("rolora", 2, "lora_A")],
)  # fmt: skip
def test_only_the_half_that_trains_changes_and_travels(
    llama: BaseModel, examples: list[Tokenized], method: Method, round_: int, half: str
) -> None:
    adapter = random_adapter(llama.spec(), 1)
    delta = run_round(llama, adapter, examples, method=method, round_=round_)
    assert set(delta) == {name for name in adapter if half in name}
    assert all(value.any() for value in delta.values())
    after = llama.get_adapter()
    frozen = [name for name in adapter if half not in name]
    assert all(np.array_equal(after[name], adapter[name]) for name in frozen)
    # The next round of a method that trains both finds both trainable again.
    assert set(run_round(llama, adapter, examples)) == set(adapter)


def test_a_lower_rank_starts_from_the_same_function(
    llama: BaseModel, llama_folder: Path, examples: list[Tokenized]
) -> None:
    adapter, residual = random_adapter(llama.spec(), 1), random_adapter(llama.spec(), 2)
    lower, rest = lower_rank(adapter, residual, 1, SCALE)
    base = load(llama_folder, **LoraConfig(rank=4).at_rank(1).model_dump(exclude={"targets"}))
    assert mean_loss(base, lower, examples, CONFIG, rest) == pytest.approx(
        mean_loss(llama, adapter, examples, CONFIG, residual), rel=1e-5
    )
    delta = run_round(base, lower, examples, rest)
    assert AdapterSpec.of(delta) == llama.spec().at_rank(1)


def test_scoring_counts_the_residual(llama: BaseModel) -> None:
    held_out = HeldOut(
        {"x": [Record(messages=None, prompt="w1 w2", completion=" w3", patient="p", fields={})]}, {}
    )
    adapter, residual = random_adapter(llama.spec(), 1), random_adapter(llama.spec(), 2)
    alone = evaluate(llama, adapter, held_out, CONFIG)["all"]["loss"]
    assert evaluate(llama, adapter, held_out, CONFIG, residual)["all"]["loss"] != alone


def test_a_residual_of_other_layers_is_refused_and_nothing_is_loaded(
    llama: BaseModel, start: Start
) -> None:
    residual = random_adapter(llama.spec(), 2)
    del residual[next(iter(residual))]
    with pytest.raises(UpdateError, match="lacks tensor"):
        llama.set_adapter(start(llama), residual)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_exported_adapter_is_both_in_one(
    llama_folder: Path, tmp_path: Path, rslora: bool
) -> None:
    base = load(llama_folder, nf4=False, rslora=rslora)
    adapter, residual = random_adapter(base.spec(), 1), random_adapter(base.spec().at_rank(5), 2)
    config = validate(
        RunConfig,
        {"model": {"base": "tiny-llama"}, "lora": {"rank": 4, "rslora": rslora}},
        "run.toml",
    )
    checkpoint = Checkpoint(
        round=1, adapter=adapter, residual=residual, issued=1,
        origin=Origin(base_digest="d", family="causal"),
    )  # fmt: skip
    write_adapter(tmp_path / "adapter", config, checkpoint, "# card\n")
    merge(llama_folder, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    ).eval()
    base.set_adapter(adapter, residual)
    base.model.eval()
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, base.model(ids).logits, atol=1e-4, rtol=1e-4)
