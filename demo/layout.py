"""Layout: the folder of records that were dealt to sites, with a held-out set of all.

<out>/<site>/records.jsonl    what that site trains on
<out>/<site>/earlier/         what it may train on again, where it has learned other tasks before
<out>/held-out/<name>.jsonl   what no site has
<out>/held-out/choices.json   the options of each field that is scored
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from demo.partition import Row
from fedqlora.errors import DataError


def write_layout(
    out: Path,
    sites: Mapping[str, Sequence[Row]],
    held_out: Mapping[str, Sequence[Row]],
    choices: Mapping[str, Sequence[str]],
    earlier: Mapping[str, Mapping[str, Sequence[Row]]] = MappingProxyType({}),
) -> None:
    """Write the folder whole, or leave what was there.

    Args:
        out: replaced if it exists.
        sites: each site's rows by its name.
        held_out: rows by the name of their file.
        choices: options by field.
        earlier: each site's rows of earlier tasks, by the name of their file.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for name, rows in sites.items():
                _write_rows(building / name / "records.jsonl", rows)
            for name, files in earlier.items():
                for task, rows in files.items():
                    _write_rows(building / name / "earlier" / f"{task}.jsonl", rows)
            for name, rows in held_out.items():
                _write_rows(building / "held-out" / f"{name}.jsonl", rows)
            text = json.dumps(choices)
            (building / "held-out" / "choices.json").write_text(text, encoding="utf-8")
            building.chmod(0o755)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(building, out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror}); free it or name another"
        ) from None


def count_labels(folder: Path, sites: Sequence[str], label: str) -> dict[str, dict[str, int]]:
    """Site -> value of a column -> number of its records, of data that `write_layout` wrote.

    Every site has the same values, sorted, those that it lacks with 0.

    Raises:
        DataError: a file is missing or damaged.
    """
    found: dict[str, Counter[str]] = {}
    for site in sites:
        path = folder / site / "records.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                found[site] = Counter(json.loads(line)[label] for line in file)
        except (OSError, ValueError, KeyError):
            raise DataError(
                f"{path} cannot be read; remove {folder}, and the next demo makes it anew"
            ) from None
    values = sorted(set().union(*found.values()))
    return {site: {value: counts[value] for value in values} for site, counts in found.items()}


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
