"""Wards: the ICD-10 texts as three tasks, each of other chapters, which hospitals learn in turn.

    <out>/<site>/records.jsonl            the texts of this task's chapters
    <out>/<site>/earlier/<task>.jsonl     what the same hospital had of each earlier task
    <out>/held-out/<task>.jsonl           leaf codes that no hospital has, a file for every task
    <out>/held-out/choices.json           all 17 chapters

Guarantees: those of demo/data.py; a hospital's records of a task are the same bytes whether the
task is new or an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from demo.codes import CHAPTERS
from demo.data import Task, deal, make_row, make_task
from demo.layout import write_layout
from demo.partition import Partition, Row
from fedqlora.errors import ConfigError

WARDS: Mapping[str, tuple[str, ...]] = {
    "medicine": tuple(CHAPTERS[number] for number in ("1", "3", "4", "9", "10", "11")),
    "senses": tuple(CHAPTERS[number] for number in ("5", "6", "7", "8", "12", "13")),
    "family": tuple(CHAPTERS[number] for number in ("2", "14", "15", "16", "17")),
}
"""Task -> its chapters; every chapter is in one."""


def make_wards(
    out: Path,
    sites: int,
    seed: int,
    task: str,
    earlier: Sequence[str],
    partition: Partition = "dirichlet",
) -> dict[str, list[Row]]:
    """Write every hospital's records of a task, those of earlier ones, and the held-out set.

    Args:
        out: replaced if it exists.
        sites: number of hospitals.
        seed: of every draw.
        task: a key of `WARDS`.
        earlier: the tasks before it.
        partition: how the hospitals differ.

    Returns:
        The hospitals' rows of this task by name, for `demo.data.describe`.

    Raises:
        ConfigError: the number of sites is out of range, or there is no such task.
        DataError: the folder cannot be written.
    """
    for name in (task, *earlier):
        check_task(name)
    whole = make_task(seed)
    dealt = {name: _deal(whole, name, sites, seed, partition) for name in (*earlier, task)}
    held_out = {
        name: [make_row(text) for text in whole.codes if text.chapter in chapters]
        for name, chapters in WARDS.items()
    }
    before = {
        site: {name: dealt[name][site] for name in earlier} for site in dealt[task] if earlier
    }
    choices = {"chapter": list(CHAPTERS.values())}
    write_layout(out, dealt[task], held_out, choices, before)
    return dealt[task]


def check_task(name: str) -> None:
    """Refuse a task that there are no records of.

    Raises:
        ConfigError: names those that there are.
    """
    if name not in WARDS:
        raise ConfigError(
            f"the demo has no records of task {name}; set continual.task to one of "
            f"{', '.join(WARDS)}"
        )


def _deal(
    whole: Task, name: str, sites: int, seed: int, partition: Partition
) -> dict[str, list[Row]]:
    """One task's rows by hospital; its patients are other ones than another task's."""
    texts = [text for text in whole.training if text.chapter in WARDS[name]]
    return {
        site: [{**row, "patient_id": f"{name}-{row['patient_id']}"} for row in rows]
        for site, rows in deal(texts, sites, seed, partition).items()
    }
