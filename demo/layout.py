"""Layout: the folder of records that were dealt to sites, with a held-out set of all.

<out>/<site>/records.jsonl    what that site trains on
<out>/<site>/earlier/         what it may train on again, where it has learned other tasks before
<out>/held-out/<name>.jsonl   what no site has
<out>/held-out/choices.json   the options of each field that is scored
<out>/newcomer/               likewise a held-out set, of a site that takes no part
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from demo.partition import Row
from fedqlora.errors import DataError
from fedqlora.files import replace_folder


def write_layout(
    out: Path,
    sites: Mapping[str, Sequence[Row]],
    held_out: Mapping[str, Sequence[Row]],
    choices: Mapping[str, Sequence[str]],
    earlier: Mapping[str, Mapping[str, Sequence[Row]]] = MappingProxyType({}),
    newcomer: Sequence[Row] = (),
) -> None:
    """Write the folder whole, or leave what was there.

    Args:
        out: replaced if it exists.
        sites: each site's rows by its name.
        held_out: rows by the name of their file.
        choices: options by field.
        earlier: each site's rows of earlier tasks, by the name of their file.
        newcomer: rows of a site that takes no part.

    Raises:
        DataError: the folder cannot be written.
    """
    files = {f"{name}/records.jsonl": _to_lines(rows) for name, rows in sites.items()}
    for name, tasks in earlier.items():
        files |= {f"{name}/earlier/{task}.jsonl": _to_lines(rows) for task, rows in tasks.items()}
    files |= {f"held-out/{name}.jsonl": _to_lines(rows) for name, rows in held_out.items()}
    files["held-out/choices.json"] = json.dumps(choices).encode()
    if newcomer:
        files["newcomer/newcomer.jsonl"] = _to_lines(newcomer)
        files["newcomer/choices.json"] = files["held-out/choices.json"]
    try:
        replace_folder(out, files)
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


def _to_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
