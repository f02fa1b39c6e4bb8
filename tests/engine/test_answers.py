"""Written answers: those of greedy decoding one row at a time; their scores by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedqlora.engine.answers import compare, write_answers
from fedqlora.engine.data import Record, Tokenized
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut
from fedqlora.engine.model import BaseModel
from fedqlora.training_config import TrainingConfig

from .conftest import load
from .test_evaluate import next_logits, random_adapter

PROMPTS = [tuple(3 + (11 * i + 5 * j) % 60 for j in range(2 + i % 4)) for i in range(7)]


@pytest.fixture(params=["llama", "t5", "mamba"])
def base(request: pytest.FixtureRequest, mamba_folder: Path) -> BaseModel:
    if request.param == "mamba":
        return load(mamba_folder, nf4=False, targets=["in_proj"])
    return request.getfixturevalue(request.param)


def decode_alone(base: BaseModel, prompt: tuple[int, ...], most: int) -> str:
    """The likeliest token after the likeliest token: one row, no cache, no padding."""
    path: tuple[int, ...] = ()
    while len(path) < most:
        token = int(next_logits(base, prompt, path).argmax())
        if token == base.tokenizer.eos_token_id:
            break
        path = (*path, token)
    return base.tokenizer.decode(path, skip_special_tokens=True).strip()


def test_a_batch_of_prompts_of_many_lengths_writes_what_each_alone_writes(base: BaseModel) -> None:
    base.set_adapter(random_adapter(base, 3))
    base.model.eval()
    examples = [Tokenized(prompt, (5,)) for prompt in PROMPTS]
    with torch.inference_mode(), base.computing():
        written = write_answers(base, examples, 6, 2048)
        again = write_answers(base, examples, 6, 8)
        alone = [decode_alone(base, prompt, 6) for prompt in PROMPTS]
    assert written == again == alone
    assert len(set(written)) > 1


def record(completion: str) -> Record:
    return Record(messages=None, prompt="w9", completion=completion, patient="x", fields={})


def test_answers_are_compared_word_by_word() -> None:
    right = record(" the cat sat down ")
    same, near, far = compare(["the cat sat down", "the cat", "dogs"], [right] * 3)
    assert same == pytest.approx({"exact_match": 1, "rouge1": 1, "rouge2": 1, "rougeL": 1})
    # Two words of two are right, two of four are there: F = 2 * 1 * 0.5 / 1.5. Of pairs 1 and 1/3.
    assert near == pytest.approx(
        {"exact_match": 0, "rouge1": 2 / 3, "rouge2": 0.5, "rougeL": 2 / 3}
    )
    assert far == dict.fromkeys(same, 0)


def test_scores_of_answers_are_means_over_rows_with_their_errors(llama: BaseModel) -> None:
    adapter = random_adapter(llama, 2)
    rows = [record("w1 w2"), record("w3")]
    plain = evaluate(llama, adapter, HeldOut({"text": rows}, {}), TrainingConfig())["text"]
    scores = evaluate(llama, adapter, HeldOut({"text": rows}, {}), TrainingConfig(), None, 4)[
        "text"
    ]
    added = {"exact_match", *(f"rouge{n}{e}" for n in "12L" for e in ("", "_error"))}
    assert scores.keys() - plain.keys() == added
    assert scores["loss"] == plain["loss"]
    assert scores["exact_match"] == 0
