"""Data report: counts, lengths and problems of a site's records, for the site's own people.

Guarantees: no text, no id, no value of any column; no count of fewer than `FEWEST` records or
patients, and no length that fewer than so many records share the far side of, so that what is
printed can be shown to a colleague.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedqlora.engine.records import Record, list_files, load_records
from fedqlora.errors import DataError

FEWEST = 8
"""A smaller number says more about single patients than about the data."""
_QUANTILES = (0.05, 0.5, 0.95)


def report(path: Path) -> tuple[str, bool]:
    """Read every data file of a site and describe them.

    Args:
        path: a data file, or a folder of them.

    Returns:
        The report, and whether a trainer could use the records.

    Raises:
        DataError: there is no data file.
    """
    records: list[Record] = []
    lines: list[str] = []
    problems: list[str] = []
    for file in list_files(path):
        try:
            found = load_records(file, minimum=0)
        except DataError as error:
            problems.append(str(error))
            continue
        lines.append(f"{file.name}: {_count(len(found), 'records')}")
        records += found
    usable = not problems
    if len(records) < FEWEST:
        problems.append(f"fewer than {FEWEST} records: a trainer refuses them; add records")
        usable = False
    else:
        lines += _describe(records)
        problems += _find_problems(records)
    lines += ["", "problems:" if problems else "no problems found"]
    return "\n".join(lines + [f"- {problem}" for problem in problems]), usable


def _describe(records: Sequence[Record]) -> list[str]:
    """Totals and lengths."""
    patients = Counter(record.patient for record in records)
    lines = [
        f"all: {len(records)} records of {_count(len(patients), 'patients')}",
        "length in characters (5 %, half, 95 % are no longer):",
        f"  prompt      {_quantiles([len(_prompt(record)) for record in records])}",
        f"  completion  {_quantiles([len(_completion(record)) for record in records])}",
    ]
    if len(patients) >= FEWEST:
        lines.append(f"records of a patient: {_quantiles(list(patients.values()))}")
    return lines


def _find_problems(records: Sequence[Record]) -> list[str]:
    """What a trainer takes, but should be looked at."""
    problems = []
    without = sum(record.patient.startswith("row ") for record in records)
    if without:
        problems.append(
            f"{_count(without, 'records')} without a patient_id: each counts as a patient of its "
            "own; add the column, or one patient may be in training and in validation"
        )
    copies = len(records) - len({(_prompt(record), _completion(record)) for record in records})
    if copies:
        problems.append(f"{_count(copies, 'records')} that copy another one; remove them")
    both: dict[str, set[str]] = {}
    for record in records:
        both.setdefault(_prompt(record), set()).add(_completion(record))
    unlike = sum(len(answers) > 1 for prompt, answers in both.items() if prompt)
    if unlike:
        problems.append(f"{_count(unlike, 'prompts')} with unlike completions; check which holds")
    return problems


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number >= FEWEST else f"fewer than {FEWEST} {what}"


def _quantiles(values: Sequence[int]) -> str:
    """Three quantiles, of which the outer ones are left out where they are too few records'."""
    cells = [
        f"{np.quantile(values, share, method='lower'):.0f}"
        if min(share, 1 - share) * len(values) >= FEWEST
        else "-"
        for share in _QUANTILES
    ]
    return "".join(f"{cell:>8}" for cell in cells)


def _prompt(record: Record) -> str:
    if record.messages is None:
        return record.prompt
    return "\n".join(turn["content"] for turn in record.messages[:-1])


def _completion(record: Record) -> str:
    return record.completion if record.messages is None else record.messages[-1]["content"]
