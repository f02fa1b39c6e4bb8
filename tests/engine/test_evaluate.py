"""Scoring by likelihood over options: equal to scoring each option by itself; metrics by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedqlora.adapter import Adapter
from fedqlora.engine.data import Record, tokenize
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.engine.model import BaseModel
from fedqlora.engine.prompts import encode_prompts
from fedqlora.engine.scoring import Search, build_trie
from fedqlora.engine.train import mean_loss
from fedqlora.errors import DataError
from fedqlora.training_config import TrainingConfig

from .conftest import load

# Deep and shallow options with common starts, and a second field that shares them.
OPTIONS = {
    "long": [(5, 6, a, b) for a in range(7, 12) for b in range(20, 26)] + [(9, 8), (9, 7, 3, 4)],
    "short": [(5, 6), (9,), (30, 31, 32), (33,)],
}
PROMPTS = [tuple(3 + (11 * i + 5 * j) % 60 for j in range(2 + i % 5)) for i in range(9)]


def random_adapter(base: BaseModel, seed: int) -> Adapter:
    """An adapter with B not zero, so that a forgotten adapter shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul(0.3).numpy()
        for name, shape in base.spec().shapes
    }


def next_logits(base: BaseModel, prompt: tuple[int, ...], path: tuple[int, ...]) -> torch.Tensor:
    """Logits (V) after a prompt and a path: one row, no cache, no padding."""
    if base.family == "causal":
        return base.model(input_ids=torch.tensor([[*prompt, *path]])).logits[0, -1]
    return base.model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *path]])
    ).logits[0, -1]


def brute_force(base: BaseModel, prompt: tuple[int, ...], options: list[Any]) -> list[float]:
    """Log-probability of each option: at every token, among the tokens that some option has."""
    starts = {option[:depth] for option in options for depth in range(len(option))}
    logits = {start: next_logits(base, prompt, start) for start in starts}
    scores = []
    for option in options:
        total = 0.0
        for depth, token in enumerate(option):
            start = option[:depth]
            ways = {o[depth] for o in options if o[:depth] == start and len(o) > depth}
            total += float(logits[start][token] - logits[start][sorted(ways)].logsumexp(0))
        scores.append(total)
    return scores


@pytest.fixture(params=["llama", "t5", "mamba"])
def base(request: pytest.FixtureRequest, mamba_folder: Path) -> BaseModel:
    if request.param == "mamba":
        return load(mamba_folder, nf4=False, targets=["in_proj"])
    return request.getfixturevalue(request.param)


def test_the_search_finds_the_option_that_scoring_each_by_itself_finds(base: BaseModel) -> None:
    base.model.eval()
    best: dict[str, set[int]] = {name: set() for name in OPTIONS}
    for seed in range(3):
        base.set_adapter(random_adapter(base, seed))
        with torch.inference_mode(), base.computing():
            search = Search(
                encode_prompts(base.model, base.family, PROMPTS, 0), len(PROMPTS),
                build_trie(OPTIONS),
            )  # fmt: skip
            for name, options in OPTIONS.items():
                found = search.best(name)
                for prompt, node in zip(PROMPTS, found, strict=True):
                    index = node.options[name]
                    scores = brute_force(base, prompt, options)
                    assert sum(math.exp(score) for score in scores) == pytest.approx(1, abs=1e-3)
                    assert scores[index] == pytest.approx(max(scores), abs=1e-4)
                    best[name].add(index)
    assert all(len(found) > 1 for found in best.values()), "one answer to all would prove nothing"


def test_a_field_that_continues_the_one_before_is_answered_below_that_answer(
    base: BaseModel,
) -> None:
    base.model.eval()
    base.set_adapter(random_adapter(base, 2))
    fields = {"short": [(5,), (9,)], "long": [(5, 6), (5, 7), (9, 8), (9, 10)], "own": [(4,), (8,)]}
    with torch.inference_mode(), base.computing():
        prompts = encode_prompts(base.model, base.family, PROMPTS, 0)
        search = Search(prompts, len(PROMPTS), build_trie(fields))
        first = search.best("short")
        below = search.best("long", first)
        for prompt, node, start in zip(PROMPTS, below, first, strict=True):
            options = [option for option in fields["long"] if option[:1] == start.path]
            scores = brute_force(base, prompt, options)
            assert scores[options.index(node.path)] == pytest.approx(max(scores), abs=1e-4)
        # A field of its own is searched from the start, whatever was answered before.
        assert [n.path for n in search.best("own", first)] == [n.path for n in search.best("own")]


def test_the_score_of_a_completion_is_its_log_likelihood(base: BaseModel) -> None:
    base.model.eval()
    base.set_adapter(random_adapter(base, 1))
    completions = [tuple(3 + (i + j) % 60 for j in range(1 + i % 4)) for i in range(len(PROMPTS))]
    with torch.inference_mode(), base.computing():
        prompts = encode_prompts(base.model, base.family, PROMPTS, 0)
        scores = Search(prompts, len(PROMPTS), build_trie(OPTIONS)).score(completions)
        for prompt, completion, score in zip(PROMPTS, completions, scores, strict=True):
            alone = sum(
                float(next_logits(base, prompt, completion[:depth]).log_softmax(0)[token])
                for depth, token in enumerate(completion)
            )
            assert score == pytest.approx(alone, abs=1e-3)


def held_out(rows: list[tuple[str, str, str]]) -> HeldOut:
    records = [
        Record(messages=None, prompt=p, completion=c, patient=str(i), fields={"answer": right})
        for i, (p, c, right) in enumerate(rows)
    ]
    return HeldOut({"one": records[:3], "two": records[3:]}, {"answer": ("w1", "w2 w3")})


ROWS = [("w9 w8", "w1 w5", "w1"), ("w9 w8", "w2 w3", "w2 w3"), ("w7", "w1", "w1"),
        ("w6 w5 w4", "w2 w3 w9", "w2 w3")]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accuracy_counts_right_answers_and_the_loss_is_the_training_loss(
    name: str, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(name)
    adapter = random_adapter(base, 4)
    config = TrainingConfig()
    scores = evaluate(base, adapter, held_out(ROWS), config)

    assert [scores[subset]["examples"] for subset in ("one", "two", "all")] == [3, 1, 4]
    # The two rows with one prompt have different right answers: exactly one of them is right.
    # So of the first three rows, one or two are right.
    assert scores["one"]["answer"] in (1 / 3, 2 / 3)
    total = 3 * scores["one"]["answer"] + scores["two"]["answer"]
    assert scores["all"]["answer"] == pytest.approx(total / 4)

    records = held_out(ROWS).subsets["one"]
    tokens = tokenize(records, base.tokenizer, base.family, config.max_length)
    assert scores["one"]["loss"] == pytest.approx(
        mean_loss(base, adapter, tokens, config), rel=1e-4
    )


def test_a_small_batch_gives_the_scores_of_a_large_one(llama: BaseModel) -> None:
    adapter = random_adapter(llama, 2)
    large = evaluate(llama, adapter, held_out(ROWS), TrainingConfig())
    small = evaluate(llama, adapter, held_out(ROWS), TrainingConfig(microbatch_tokens=16))
    for subset, scores in large.items():
        assert small[subset] == pytest.approx(scores, rel=1e-4)


def test_plain_text_without_a_prompt_gets_a_loss(llama: BaseModel) -> None:
    record = Record(messages=None, prompt="", completion="w1 w2 w3", patient="x", fields={})
    scores = evaluate(
        llama, random_adapter(llama, 2), HeldOut({"text": [record]}, {}), TrainingConfig()
    )
    assert set(scores["text"]) == {"examples", "loss", "perplexity"}
    assert scores["text"]["loss"] > 0
    assert scores["text"]["perplexity"] == pytest.approx(math.exp(scores["text"]["loss"]))


def test_the_error_of_the_loss_is_that_of_a_ratio_of_sums(llama: BaseModel) -> None:
    adapter = random_adapter(llama, 4)
    found = evaluate(llama, adapter, held_out(ROWS), TrainingConfig())["all"]
    records = [record for own in held_out(ROWS).subsets.values() for record in own]
    losses, sizes = [], []
    for record in records:
        alone = evaluate(llama, adapter, HeldOut({"x": [record]}, {}), TrainingConfig())["x"]
        (tokens,) = tokenize([record], llama.tokenizer, "causal", 64)
        sizes.append(len(tokens.completion))
        losses.append(alone["loss"] * sizes[-1])
    parts = [loss - found["loss"] * size for loss, size in zip(losses, sizes, strict=True)]
    variance = sum(part**2 for part in parts) / (len(parts) - 1)
    assert found["loss_error"] == pytest.approx(
        (variance * len(parts)) ** 0.5 / sum(sizes), rel=1e-3
    )


@pytest.mark.parametrize("paths", [[(5, 6), (5, 6)], [(5,), (5, 6)], [(5, 6), (5,)], [(), (5,)]])
def test_options_that_are_the_same_tokens_or_start_one_another_are_refused(
    paths: list[tuple[int, ...]],
) -> None:
    with pytest.raises(DataError, match="field `chapter`"):
        build_trie({"chapter": paths})


ROW = {"prompt": "a", "completion": " Eye, H10", "chapter": "Eye"}


def write_held_out(folder: Path, rows: list[dict[str, str]], choices: object) -> Path:
    (folder / "codes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.json").write_text(json.dumps(choices))
    return folder


def test_a_held_out_folder_is_read_in_file_order(tmp_path: Path) -> None:
    other = {**ROW, "completion": " Ear, H60", "chapter": "Ear"}
    folder = write_held_out(tmp_path, [other, ROW, ROW], {"chapter": ["Eye", "Ear"]})
    found = load_held_out(folder, max_examples=2)
    assert [r.fields["chapter"] for r in found.subsets["codes"]] == ["Ear", "Eye"]
    assert found.choices == {"chapter": ("Eye", "Ear")}


@pytest.mark.parametrize(
    ("row", "choices", "message"),
    [
        ({}, {"chapter": ["Ear", "Skin"]}, "record 2, column `chapter`: expected one of"),
        ({"chapter": "Ear"}, {"chapter": ["Ear", "Eye"]}, "expected the start of the completion"),
        ({"chapter": None}, {"chapter": ["Ear", "Eye"]}, "record 2, column `chapter`"),
        ({}, {"chapter": ["Eye", "Eye disease"]}, "option 1 is the start of option 2"),
        ({}, {"chapter": ["Eye", "Eye"]}, "is the start of option"),
        ({}, {"chapter": ["Eye"]}, "field `chapter`: expected"),
        ({}, {"chapter": "Eye"}, "field `chapter`: expected"),
        ({}, {"loss": ["Eye", "Ear"]}, "the name is taken"),
        ({}, {"x_error": ["Eye", "Ear"]}, "the name is taken"),
        ({}, [], "not a table of fields"),
    ],
)
def test_a_held_out_fault_is_named(
    tmp_path: Path, row: dict[str, str], choices: Any, message: str
) -> None:
    good = {"prompt": "a", "completion": "Ear", "chapter": "Ear"}
    folder = write_held_out(tmp_path, [good, {**ROW, **row}], choices)
    with pytest.raises(DataError, match=message):
        load_held_out(folder)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.jsonl"):
        load_held_out(tmp_path)
