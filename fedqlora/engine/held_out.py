"""The held-out set: what an adapter is scored on, read and checked before anything is scored.

<subset>.jsonl   records with `prompt` and `completion`, and one column per field
choices.json     optional: {"<field>": ["<option>", ...], ...}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedqlora.engine.data import Record, load_records
from fedqlora.errors import DataError

ALL = "all"
"""Where the scores of all files together are."""
_TAKEN = ("examples", "loss", "perplexity", "exact_match", "rouge1", "rouge2", "rougeL")


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
        if name in _TAKEN or name.endswith("_error"):
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
