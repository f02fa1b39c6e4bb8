from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedqlora.adapter import Adapter
from fedqlora.engine.batch import Microbatch, count_targets, pack_rows, pad_pairs, pad_rows
from fedqlora.engine.data import Tokenized
from fedqlora.engine.loss import check_isolation, compute_logits, plan_batches, sum_losses
from fedqlora.engine.model import BaseModel
from fedqlora.training_config import TrainingConfig
from tests.engine.conftest import load

Start = Callable[[BaseModel], Adapter]


def targets(batches: list[Microbatch]) -> list[int]:
    return sorted(int(token) for batch in batches for token in batch.targets)


def test_two_examples_are_packed_by_hand() -> None:
    (batch,) = pack_rows([Tokenized((10, 11), (12, 13)), Tokenized((20,), (21, 22))], 64)
    assert batch.inputs["input_ids"].shape == (1, 64)
    assert batch.inputs["input_ids"][0, :8].tolist() == [10, 11, 12, 13, 20, 21, 22, 0]
    assert batch.inputs["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.keep.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [12, 13, 21, 22]
    assert set(batch.inputs) == {"input_ids", "position_ids"}


def test_text_without_a_prompt_learns_all_but_its_first_token() -> None:
    text = Tokenized((), (10, 11, 12))
    assert count_targets(text, "causal") == 2
    (batch,) = pack_rows([text], 64)
    assert batch.keep.tolist() == [0, 1]
    assert batch.targets.tolist() == [11, 12]


def test_padded_rows_are_masked() -> None:
    (batch,) = pad_rows([Tokenized((10, 11), (12, 13)), Tokenized((20,), (21, 22))], 128, 0)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [4, 3]
    assert batch.keep.tolist() == [1, 2, 64, 65]
    assert batch.targets.tolist() == [12, 13, 21, 22]


def test_pairs_go_to_encoder_and_decoder() -> None:
    (batch,) = pad_pairs([Tokenized((10, 11), (12, 13, 1))], 64, padding=0, start=9)
    assert batch.inputs["input_ids"][0, :3].tolist() == [10, 11, 0]
    assert batch.inputs["decoder_input_ids"].shape == (1, 16)
    assert batch.inputs["decoder_input_ids"][0, :4].tolist() == [9, 12, 13, 0]
    assert batch.keep.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [12, 13, 1]


@pytest.mark.parametrize("limit", [64, 128, 256, 4096])
def test_every_target_is_there_once_and_no_microbatch_is_above_the_limit(limit: int) -> None:
    many = [Tokenized(tuple(range(3, 4 + i % 50)), (i, i + 1)) for i in range(40)]
    expected = sorted(token for e in many for token in e.completion)
    for batches in (pack_rows(many, limit), pad_rows(many, limit, 0), pad_pairs(many, limit, 0, 0)):
        assert targets(batches) == expected
        assert all(batch.inputs["input_ids"].numel() <= limit for batch in batches)
        assert all(batch.inputs["input_ids"].shape[1] % 64 == 0 for batch in batches)


def test_an_example_longer_than_the_limit_still_goes_through_whole() -> None:
    long = Tokenized(tuple(range(100)), (1, 2))
    assert pack_rows([long, long], 64)[0].inputs["input_ids"].shape == (1, 128)


def test_packing_wastes_less_than_padding() -> None:
    many = [Tokenized(tuple(range(20 + i % 13)), (1, 2)) for i in range(64)]

    def size(batches: list[Microbatch]) -> int:
        return sum(batch.inputs["input_ids"].numel() for batch in batches)

    real = sum(len(e.prompt) + len(e.completion) for e in many)
    assert size(pack_rows(many, 2048)) < 1.2 * real < 2 * real < size(pad_rows(many, 2048, 0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_changing_one_packed_example_leaves_the_others_logits_unchanged(
    llama: BaseModel, start: Start, attention: str
) -> None:
    llama.set_adapter({name: value + 0.01 for name, value in start(llama).items()})
    llama.model.eval()
    # Rows above 256 tokens use sdpa on a CPU, shorter ones plain attention.
    length = {"eager": 17, "sdpa": 140}[attention]
    parts = [
        Tokenized(tuple(3 + (5 * k + j) % 60 for j in range(length)), (4, 5, 1)) for k in range(3)
    ]
    changed = [parts[0], Tokenized(tuple(62 - t for t in parts[1].prompt), (7, 8, 9)), parts[2]]
    with torch.no_grad():
        before, after = (compute_logits(llama, pack_rows(row, 2048)[0]) for row in (parts, changed))
    assert llama.model.config._attn_implementation == attention
    moved = [i for i in range(len(before)) if not torch.equal(before[i], after[i])]
    assert moved == [3, 4, 5]


def test_packed_padded_and_single_examples_have_the_same_loss(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    llama.set_adapter({name: value + 0.01 for name, value in start(llama).items()})
    llama.model.eval()
    losses = []
    with torch.no_grad():
        for batches in (
            pack_rows(examples, 2048),
            pack_rows(examples, 64),
            pad_rows(examples, 2048, 0),
            [batch for example in examples for batch in pad_rows([example], 64, 0)],
        ):
            losses.append(sum(float(sum_losses(llama, batch)) for batch in batches))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_the_loss_is_that_of_transformers(
    llama: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    llama.set_adapter(start(llama))
    llama.model.eval()
    example = examples[3]
    ids = torch.tensor([example.prompt + example.completion])
    labels = ids.clone()
    labels[:, : len(example.prompt)] = -100
    with torch.no_grad():
        theirs = float(llama.model(input_ids=ids, labels=labels).loss) * len(example.completion)
        (batch,) = pack_rows([example], 64)
        assert float(sum_losses(llama, batch)) == pytest.approx(theirs, rel=1e-5)


def test_the_seq2seq_loss_is_that_of_transformers(
    t5: BaseModel, start: Start, examples: list[Tokenized]
) -> None:
    t5.set_adapter(start(t5))
    t5.model.eval()
    with torch.no_grad():
        theirs = sum(
            len(e.completion)
            * float(
                t5.model(
                    input_ids=torch.tensor([e.prompt]), labels=torch.tensor([e.completion])
                ).loss
            )
            for e in examples
        )
        batches = plan_batches(t5, examples, TrainingConfig())
        assert sum(float(sum_losses(t5, b)) for b in batches) == pytest.approx(theirs, rel=1e-4)


def test_an_attention_model_packs_and_a_recurrent_one_does_not(
    llama: BaseModel, mamba_folder: Path
) -> None:
    assert check_isolation(llama)
    mamba = load(mamba_folder, nf4=False, targets=("in_proj",))
    assert not check_isolation(mamba)
    batches = plan_batches(mamba, [Tokenized((5, 6), (7, 1))], TrainingConfig())
    assert "attention_mask" in batches[0].inputs


def test_an_attention_model_that_drops_position_ids_is_found_out(llama_folder: Path) -> None:
    base = load(llama_folder, nf4=False)
    inner = base.model.get_base_model().model
    inner.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    assert not check_isolation(base)


def test_packing_can_be_turned_off(llama: BaseModel, examples: list[Tokenized]) -> None:
    batches = plan_batches(llama, examples, TrainingConfig(packing=False))
    assert all("attention_mask" in batch.inputs for batch in batches)
