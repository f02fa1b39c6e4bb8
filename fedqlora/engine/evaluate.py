"""Evaluation: accuracy over given options, loss and written answers, one scoring for all models.

A row's answer to a field of `choices.json` (held_out.py) is the likeliest option as the start of
the completion (scoring.py); the row names the right one in the column of that name. White space at
the start of a completion goes before every option. A base model that was never told the format is
thus not marked down for its format.

Of the loss and of ROUGE the standard error is told beside it, from the spread over rows; that of
an accuracy follows from the number of rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedqlora.adapter import Adapter
from fedqlora.engine.answers import ROUGE, compare, write_answers
from fedqlora.engine.data import Record, Tokenized, tokenize
from fedqlora.engine.held_out import ALL, HeldOut
from fedqlora.engine.model import BaseModel
from fedqlora.engine.prompts import encode_prompts
from fedqlora.engine.scoring import Node, Search, build_trie
from fedqlora.training_config import TrainingConfig

_MAX_BATCH = 64


def evaluate(
    base: BaseModel,
    adapter: Adapter,
    held_out: HeldOut,
    config: TrainingConfig,
    residual: Adapter | None = None,
    answer_tokens: int = 0,
) -> dict[str, dict[str, float]]:
    """Score an adapter on a held-out set.

    Args:
        base: the model; its adapter is set to `adapter`.
        adapter: what is scored; all B zero is the untuned model.
        held_out: what `load_held_out` gave.
        config: `max_length` and `microbatch_tokens` are used.
        residual: what lies frozen beside the adapter; None for nothing.
        answer_tokens: longest answer that is written for each row; 0 writes none.

    Returns:
        Subset -> {"examples": rows, "loss": mean loss of a completion token, "loss_error": its
        standard error, field: share of rows whose likeliest option is the right one}, where there
        are no fields "perplexity", and of written answers "exact_match", "rouge1", "rouge2" and
        "rougeL" with the errors of these; and the same over all rows as "all".
    """
    base.set_adapter(adapter, residual)
    base.model.eval()
    rows = [(name, record) for name, records in held_out.subsets.items() for record in records]
    records = [record for _, record in rows]
    examples = [
        _anchor(example)
        for example in tokenize(records, base.tokenizer, base.family, config.max_length)
    ]
    tries = _Tries(base.tokenizer, held_out.choices)
    results: list[_Result] = [_Result(0.0, 0, {})] * len(rows)
    with torch.inference_mode(), base.computing():
        for batch in _batches(records, examples, config.microbatch_tokens):
            found = _score_batch(
                base, [records[i] for i in batch], [examples[i] for i in batch], tries
            )
            for index, result in zip(batch, found, strict=True):
                results[index] = result
        if answer_tokens:
            written = write_answers(base, examples, answer_tokens, config.microbatch_tokens)
            for result, near in zip(results, compare(written, records), strict=True):
                result.figures.update(near)
    report: dict[str, dict[str, float]] = {}
    for name in (*held_out.subsets, ALL):
        own = [r for (subset, _), r in zip(rows, results, strict=True) if name in (subset, ALL)]
        report[name] = _summarise(own)
        if not held_out.choices:
            report[name]["perplexity"] = math.exp(min(report[name]["loss"], 700.0))
    return report


@dataclass(frozen=True)
class _Result:
    """One row: summed loss over its completion tokens, their number, figure -> value."""

    loss: float
    tokens: int
    figures: dict[str, float]


class _Tries:
    """Tries of the options by the white space that goes before them, made when first needed."""

    def __init__(self, tokenizer: Any, choices: Mapping[str, Sequence[str]]) -> None:
        self._tokenizer = tokenizer
        self.choices = choices
        self._made: dict[str, Node] = {}

    def get(self, space: str) -> Node:
        """The trie of all fields' options, each after `space`."""
        if space not in self._made:
            self._made[space] = build_trie(
                {
                    name: [
                        tuple(
                            self._tokenizer(space + option, add_special_tokens=False)["input_ids"]
                        )
                        for option in options
                    ]
                    for name, options in self.choices.items()
                }
            )
        return self._made[space]


def _space(record: Record) -> str:
    """White space at the start of a completion."""
    return record.completion[: len(record.completion) - len(record.completion.lstrip())]


def _anchor(example: Tokenized) -> Tokenized:
    """Without a prompt, the first token cannot be predicted and is read as the prompt."""
    if example.prompt:
        return example
    return Tokenized(example.completion[:1], example.completion[1:])


def _batches(
    records: Sequence[Record], examples: Sequence[Tokenized], tokens: int
) -> list[list[int]]:
    """Rows of similar prompt length, padded to at most `tokens` tokens a batch."""
    order = sorted(
        range(len(examples)), key=lambda i: (_space(records[i]), len(examples[i].prompt), i)
    )
    batches: list[list[int]] = []
    for index in order:
        length = len(examples[index].prompt)
        if (
            not batches
            or len(batches[-1]) == _MAX_BATCH
            or (len(batches[-1]) + 1) * length > tokens
            or _space(records[batches[-1][0]]) != _space(records[index])
        ):
            batches.append([])
        batches[-1].append(index)
    return batches


def _score_batch(
    base: BaseModel, records: Sequence[Record], examples: Sequence[Tokenized], tries: _Tries
) -> list[_Result]:
    """Loss and answers of one batch, its prompts encoded once."""
    pad = base.tokenizer.pad_token_id or 0
    prompts = encode_prompts(base.model, base.family, [e.prompt for e in examples], pad)
    search = Search(prompts, len(examples), tries.get(_space(records[0])))
    losses = search.score([example.completion for example in examples])
    right: list[dict[str, float]] = [{} for _ in records]
    answers: list[Node] | None = None
    for name, options in tries.choices.items():
        answers = search.best(name, answers)
        for row, (record, node) in enumerate(zip(records, answers, strict=True)):
            right[row][name] = float(options[node.options[name]] == record.fields[name])
    return [
        _Result(-loss, len(example.completion), own)
        for loss, example, own in zip(losses, examples, right, strict=True)
    ]


def _summarise(results: Sequence[_Result]) -> dict[str, float]:
    """Means over rows, the loss over tokens, and the standard errors of loss and ROUGE."""
    tokens = max(sum(r.tokens for r in results), 1)
    loss = sum(r.loss for r in results) / tokens
    summary: dict[str, float] = {"examples": len(results), "loss": loss}
    if len(results) > 1:
        # A ratio of two sums over rows: its error is that of the rows' residuals.
        parts = [r.loss - loss * r.tokens for r in results]
        summary["loss_error"] = statistics.stdev(parts) * len(results) ** 0.5 / tokens
    for name in results[0].figures:
        values = [r.figures[name] for r in results]
        summary[name] = sum(values) / len(values)
        if name in ROUGE and len(values) > 1:
            summary[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5
    return summary
