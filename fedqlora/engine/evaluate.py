"""Evaluation: accuracy over given options and loss on a held-out set, one scoring for all models.

A held-out folder holds

    <subset>.jsonl   records with `prompt` and `completion`, and one column per field
    choices.json     optional: {"<field>": ["<option>", ...], ...}

A row's answer to a field is the likeliest option as the start of the completion (scoring.py);
the row names the right one in the column of that name. White space at the start of a completion
goes before every option. A base model that was never told the format is thus not marked down
for its format.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedqlora.adapter import Adapter
from fedqlora.config import TrainingConfig
from fedqlora.engine.data import Record, Tokenized, load_records, tokenize
from fedqlora.engine.model import BaseModel
from fedqlora.engine.prompts import encode_prompts
from fedqlora.engine.scoring import Node, Search, build_trie
from fedqlora.errors import DataError

_MAX_BATCH = 64
ALL = "all"


@dataclass(frozen=True)
class HeldOut:
    """A held-out set.

    Attributes:
        subsets: name of a file without its ending -> its records.
        choices: field -> its options.
    """

    subsets: Mapping[str, Sequence[Record]]
    choices: Mapping[str, Sequence[str]]


def load_held_out(folder: Path, max_examples: int | None = None) -> HeldOut:
    """Read a held-out folder and check that every row can be scored.

    Args:
        folder: holds one or more `*.jsonl` and, where accuracy is wanted, `choices.json`.
        max_examples: take at most so many rows of each file, the first.

    Raises:
        DataError: a file is missing or wrong, or a row's right option is not among the options
            or does not start the row's completion.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder} holds no .jsonl file; put the held-out records there")
    choices = _load_choices(folder / "choices.json")
    subsets: dict[str, Sequence[Record]] = {}
    for file in files:
        if file.stem == ALL:
            raise DataError(f"{file} has a name that means all files together; rename it")
        records = load_records(file, minimum=1)
        for number, record in enumerate(records, start=1):
            for name, options in choices.items():
                _check_row(f"{file}, record {number}, column `{name}`", record, name, options)
        subsets[file.stem] = records[:max_examples]
    return HeldOut(subsets, choices)


def _load_choices(path: Path) -> dict[str, tuple[str, ...]]:
    """The options of each field; none without a file."""
    if not path.exists():
        return {}
    expected = 'expected {"field": ["option", "another option"]}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path} cannot be read as JSON; {expected}") from None
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path} is not a table of fields; {expected}")
    for name, options in values.items():
        texts = isinstance(options, list) and all(isinstance(o, str) and o for o in options)
        if not texts or len(options) < 2:
            raise DataError(f"{path}, field `{name}`: {expected}")
        if name in ("examples", "loss"):
            raise DataError(f"{path}, field `{name}`: the name is taken; choose another")
        order = sorted(range(len(options)), key=lambda index: options[index])
        for one, other in itertools.pairwise(order):
            if options[other].startswith(options[one]):
                raise DataError(
                    f"{path}, field `{name}`: option {one + 1} is the start of option "
                    f"{other + 1}; reword one, as the shorter would always win"
                )
    return {name: tuple(options) for name, options in values.items()}


def _check_row(where: str, record: Record, name: str, options: Sequence[str]) -> None:
    """Refuse a row whose right option is missing, unknown or not the completion's start."""
    right = record.fields.get(name)
    if right is None or right not in options:
        raise DataError(f"{where}: expected one of the options in choices.json; correct that row")
    if not record.prompt:
        raise DataError(f"{where}: expected columns `prompt` and `completion` beside options")
    if not record.completion.lstrip().startswith(right):
        raise DataError(f"{where}: expected the start of the completion; correct that row")


def evaluate(
    base: BaseModel,
    adapter: Adapter,
    held_out: HeldOut,
    config: TrainingConfig,
    residual: Adapter | None = None,
) -> dict[str, dict[str, float]]:
    """Score an adapter on a held-out set.

    Args:
        base: the model; its adapter is set to `adapter`.
        adapter: what is scored; all B zero is the untuned model.
        held_out: what `load_held_out` gave.
        config: `max_length` and `microbatch_tokens` are used.
        residual: what lies frozen beside the adapter; None for nothing.

    Returns:
        Subset -> {"examples": rows, "loss": mean loss of a completion token, field: share of
        rows whose likeliest option is the right one}, and the same over all rows as "all".
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
    report: dict[str, dict[str, float]] = {}
    for name in (*held_out.subsets, ALL):
        own = [r for (subset, _), r in zip(rows, results, strict=True) if name in (subset, ALL)]
        report[name] = _summarise(own)
    return report


@dataclass(frozen=True)
class _Result:
    """One row: summed loss over its completion tokens, their number, field -> right."""

    loss: float
    tokens: int
    right: dict[str, bool]


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
    right: list[dict[str, bool]] = [{} for _ in records]
    answers: list[Node] | None = None
    for name, options in tries.choices.items():
        answers = search.best(name, answers)
        for row, (record, node) in enumerate(zip(records, answers, strict=True)):
            right[row][name] = options[node.options[name]] == record.fields[name]
    return [
        _Result(-loss, len(example.completion), own)
        for loss, example, own in zip(losses, examples, right, strict=True)
    ]


def _summarise(results: Sequence[_Result]) -> dict[str, float]:
    """Means over rows, the loss over tokens."""
    summary: dict[str, float] = {
        "examples": len(results),
        "loss": sum(r.loss for r in results) / max(sum(r.tokens for r in results), 1),
    }
    for name in results[0].right:
        summary[name] = sum(r.right[name] for r in results) / len(results)
    return summary
