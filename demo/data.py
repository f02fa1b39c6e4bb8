"""The demo's data: ICD-10-CM texts dealt to unequal hospitals, with a held-out set of all.

    <out>/<site>/records.jsonl       prompt, completion, patient_id, chapter, category, code
    <out>/held-out/codes.jsonl       leaf codes that no hospital has
    <out>/held-out/wordings.jsonl    inclusion terms: other words than any training text
    <out>/held-out/choices.json      all 17 chapters, all categories
    <out>/newcomer/newcomer.jsonl    texts of a hospital that takes no part, skewed as the others
    <out>/newcomer/choices.json      the same options

Guarantees: near-duplicates (equal `demo.codes.normalise`) are in training or held out, never
both; the same seed and number of sites write the same bytes.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.codes import CHAPTERS, Text, categories, group, read_codes, read_wordings
from demo.layout import write_layout
from demo.names import MOST_SITES, site_names
from demo.partition import PARTITIONS, Partition, Row, split
from fedqlora.errors import FedqloraError

TRAINING_TEXTS = 160
HELD_OUT_CODES = 18
HELD_OUT_WORDINGS = 8
"""Texts of each chapter, at most."""
NEWCOMER_TEXTS = 160
"""Of the hospital that takes no part."""


@dataclass(frozen=True)
class Task:
    """All texts of the demo before they are dealt to hospitals."""

    training: list[Text]
    codes: list[Text]
    wordings: list[Text]
    newcomer: list[Text]


def make_task(seed: int) -> Task:
    """Draw training and held-out texts, the same number of every chapter where there are so many.

    Guarantees: one text a normal form over all three lists.
    """
    draw = random.Random(f"task:{seed}")  # noqa: S311 - a reproducible draw, no secret
    training: list[Text] = []
    codes: list[Text] = []
    left: dict[str, list[list[Text]]] = {}
    by_chapter: dict[str, list[list[Text]]] = {chapter: [] for chapter in CHAPTERS.values()}
    for members in group(read_codes()).values():
        by_chapter[members[0].chapter].append(members)
    for chapter, groups in by_chapter.items():
        draw.shuffle(groups)
        codes += [draw.choice(members) for members in groups[:HELD_OUT_CODES]]
        rest = groups[HELD_OUT_CODES : HELD_OUT_CODES + TRAINING_TEXTS]
        training += [draw.choice(members) for members in rest]
        left[chapter] = groups[HELD_OUT_CODES + TRAINING_TEXTS :]
    draw.shuffle(codes)  # so that the first n rows are a fair sample
    seen = {text.group for text in (*training, *codes)}
    wordings: list[Text] = []
    terms = [members[0] for key, members in group(read_wordings()).items() if key not in seen]
    for chapter in CHAPTERS.values():
        own = [text for text in terms if text.chapter == chapter]
        wordings += draw.sample(own, min(HELD_OUT_WORDINGS, len(own)))
    draw.shuffle(wordings)
    taken = {text.group for text in wordings}
    return Task(training, codes, wordings, _draw_newcomer(left, taken, seed))


def _draw_newcomer(left: dict[str, list[list[Text]]], taken: set[str], seed: int) -> list[Text]:
    """Texts that nobody else has, their chapters by a draw like the hospitals', Dirichlet(0.2)."""
    draw = random.Random(f"newcomer:{seed}")  # noqa: S311 - a reproducible draw, no secret
    free = {
        chapter: [draw.choice(members) for members in groups if members[0].group not in taken]
        for chapter, groups in left.items()
    }
    weights = {chapter: draw.gammavariate(0.2, 1.0) for chapter in free}
    texts: list[Text] = []
    for _ in range(NEWCOMER_TEXTS):
        open_ = [chapter for chapter, own in free.items() if own]
        (chapter,) = draw.choices(open_, [weights[one] for one in open_])
        texts.append(free[chapter].pop())
    return texts


def deal(
    texts: Sequence[Text], sites: int, seed: int, partition: Partition = "dirichlet"
) -> dict[str, list[Row]]:
    """Deal training texts to hospitals.

    Each hospital's rows are then dealt to its synthetic patients, two to five rows each.

    Args:
        texts: what is dealt.
        sites: number of hospitals.
        seed: of every draw.
        partition: how the hospitals differ.

    Raises:
        ConfigError: so many hospitals cannot all get the least number of records.
    """
    names = site_names(sites, MOST_SITES)
    parts = split([make_row(text) for text in texts], sites, partition, seed)
    return {name: _add_patients(part, name, seed) for name, part in zip(names, parts, strict=True)}


def make_row(text: Text) -> Row:
    """The prompt, the completion and what a row is scored by."""
    return {
        "prompt": f"Diagnosis: {text.text}\nBody system:",
        "completion": f" {text.category}",
        "chapter": text.chapter,
        "category": text.category,
        "code": text.code,
    }


def _add_patients(rows: list[Row], site: str, seed: int) -> list[Row]:
    """Shuffle a hospital's rows and give them to patients with two to five rows each."""
    draw = random.Random(f"patients:{seed}:{site}")  # noqa: S311 - reproducible, no secret
    draw.shuffle(rows)
    dealt: list[Row] = []
    patient = 0
    while len(dealt) < len(rows):
        patient += 1
        for row in rows[len(dealt) : len(dealt) + draw.randint(2, 5)]:
            dealt.append({**row, "patient_id": f"{site}-{patient:04d}"})
    return dealt


def make_data(
    out: Path, sites: int, seed: int, partition: Partition = "dirichlet"
) -> dict[str, list[Row]]:
    """Write every hospital's records and the held-out set under `out`, replacing what was there.

    The held-out set is the same for every partition.

    Returns:
        The hospitals' rows by name, for `describe`.

    Raises:
        ConfigError: the number of sites is out of range.
        DataError: the folder cannot be written.
    """
    task = make_task(seed)
    hospitals = deal(task.training, sites, seed, partition)
    held_out = {
        "codes": [make_row(text) for text in task.codes],
        "wordings": [make_row(text) for text in task.wordings],
    }
    choices = {"chapter": list(CHAPTERS.values()), "category": categories()}
    newcomer = [make_row(text) for text in task.newcomer]
    write_layout(out, hospitals, held_out, choices, newcomer=newcomer)
    return hospitals


def describe(hospitals: dict[str, list[Row]]) -> str:
    """A table of what each hospital got: records, patients, and records of each chapter."""
    counts = {name: Counter(row["chapter"] for row in rows) for name, rows in hospitals.items()}
    lines = [_line("", list(hospitals))]
    lines.append(_line("records", [len(rows) for rows in hospitals.values()]))
    patients = [len({row["patient_id"] for row in rows}) for rows in hospitals.values()]
    lines.append(_line("patients", patients))
    for chapter in CHAPTERS.values():
        lines.append(_line(f"  {chapter}", [count[chapter] or "." for count in counts.values()]))
    return "\n".join(lines)


def _line(label: str, values: Sequence[object]) -> str:
    return f"{label:<28}" + "".join(f"{value!s:>7}" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data and print what each hospital got."""
    parser = argparse.ArgumentParser(prog="python -m demo.data", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that is (re)written")
    parser.add_argument("--sites", type=int, default=3, help="number of hospitals")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--partition", choices=PARTITIONS, default="dirichlet")
    parser.add_argument("--picture", type=Path, help="SVG file of what each hospital got")
    options = parser.parse_args(arguments)
    try:
        hospitals = make_data(options.out, options.sites, options.seed, options.partition)
        print(describe(hospitals))
        if options.picture:
            # Imported here: a second, which those who want no picture do not need.
            from demo.picture import draw

            draw(hospitals, options.picture)
            print(f"picture: {options.picture}")
    except FedqloraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
