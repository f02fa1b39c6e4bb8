"""Stories: public data sets of the hub dealt to sites, for experiments beyond healthcare.

    finance     banks that tell what a customer wants (Banking77)
    education   schools that answer exam questions (ARC, the easy part)

A data set is fetched at one fixed revision and never stored beside the code. Its own test split is
the held-out set. The same seed and number of sites write the same bytes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.layout import write_layout
from demo.names import site_names
from demo.partition import PARTITIONS, Partition, Row, split
from fedqlora.errors import DataError, FedqloraError

_LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True)
class Story:
    """A data set of the hub, and how its rows become records."""

    dataset: str
    """Its id on the hub."""
    revision: str
    """The commit that is fetched."""
    configuration: str | None = None
    """Which part of it, where it has several."""
    make_row: Callable[[Mapping[str, Any]], Row | None]
    """A record of one row; None leaves the row out."""
    label: str
    """The record's column that sites see more or less of."""
    answer: str
    """The record's column that is scored."""


def _ask_intent(row: Mapping[str, Any]) -> Row | None:
    """What a bank's customer wrote, and which of 77 things they want."""
    intent = row["label_text"].replace("_", " ")
    return {
        "prompt": f"A customer of a bank writes: {row['text'].strip()}\nWhat is it about?",
        "completion": intent,
        "intent": intent,
    }


def _ask_question(row: Mapping[str, Any]) -> Row | None:
    """An exam question with four options; a few have another number and are left out."""
    options, labels = row["choices"]["text"], row["choices"]["label"]
    if len(options) != len(_LETTERS):
        return None
    listed = "\n".join(f"{x}. {text}" for x, text in zip(_LETTERS, options, strict=True))
    answer = _LETTERS[labels.index(row["answerKey"])]  # some exams number their options
    return {
        "prompt": f"Question: {row['question']}\n{listed}\nAnswer:",
        "completion": f" {answer}",
        "answer": answer,
        "board": row["id"].split("_")[0],
    }


STORIES: Mapping[str, Story] = {
    # CC BY 4.0, arXiv 2003.04807. Here the names of the intents are a column of their own.
    "finance": Story(
        dataset="mteb/banking77",
        revision="0fd18e25b25c072e09e0d92ab615fda904d66300",
        make_row=_ask_intent,
        label="intent",
        answer="intent",
    ),
    # CC BY-SA 4.0, arXiv 1803.05457. Whose exam it was stands at the start of a question's id.
    "education": Story(
        dataset="allenai/ai2_arc",
        revision="210d026faf9955653af8916fad021475a3f00453",
        configuration="ARC-Easy",
        make_row=_ask_question,
        label="board",
        answer="answer",
    ),
}
"""By the name of their experiment."""


def make_story(
    story: Story,
    out: Path,
    sites: int,
    seed: int,
    partition: Partition = "dirichlet",
    source: Path | None = None,
) -> dict[str, list[Row]]:
    """Write every site's records and the held-out set under `out`, replacing what was there.

    Args:
        story: which data set.
        out: the folder, as `demo.layout` describes it.
        sites: number of sites.
        seed: of every draw.
        partition: how sites differ; `natural` keeps the rows of one label together.
        source: a folder with the data set's files; None fetches them from the hub.

    Returns:
        The sites' rows by name.

    Raises:
        ConfigError: the number of sites is out of range.
        DataError: the data set cannot be had or is another, or the folder cannot be written.
    """
    names = site_names(sites)
    training, test = (_read(story, part, source) for part in ("train", "test"))
    parts = split(training, sites, partition, seed, label=story.label, group=story.label)
    draw = random.Random(f"story:{seed}")  # noqa: S311 - a reproducible draw, no secret
    draw.shuffle(test)  # so that the first n rows are a fair sample
    answers = sorted({row[story.answer] for row in (*training, *test)})
    dealt = dict(zip(names, parts, strict=True))
    write_layout(out, dealt, {"test": test}, {story.answer: answers})
    return dealt


def _read(story: Story, part: str, source: Path | None) -> list[Row]:
    """The records of one split."""
    # Only here, as they load for a second.
    import datasets
    import httpx

    place = {"path": str(source)} if source else {"path": story.dataset, "revision": story.revision}
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="fedqlora-story-") as cache:
            found = datasets.load_dataset(
                **place, name=story.configuration, split=part, cache_dir=cache
            )
            made = [story.make_row(row) for row in found]
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set {source or story.dataset} cannot be read ({type(error).__name__}); check "
            "that this machine reaches the hub, or name a folder with its files by --source"
        ) from None
    except KeyError as error:
        raise DataError(
            f"data set {source or story.dataset} has no column {error}; name one like "
            f"{story.dataset}"
        ) from None
    return [row for row in made if row is not None]


def describe(dealt: Mapping[str, Sequence[Row]], label: str) -> str:
    """A line a site: records, how many labels it sees, and its most frequent one."""
    lines = []
    for name, rows in dealt.items():
        labels = [row[label] for row in rows]
        most = max(sorted(set(labels)), key=labels.count)
        lines.append(
            f"{name}: {len(rows)} records, {len(set(labels))} of column {label}, "
            f"{labels.count(most) / len(labels):.0%} {most}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data of a story and print what each site got."""
    parser = argparse.ArgumentParser(prog="python -m demo.stories", description=__doc__)
    parser.add_argument("story", choices=tuple(STORIES))
    parser.add_argument("--out", type=Path, required=True, help="folder that is (re)written")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--partition", choices=PARTITIONS, default="dirichlet")
    parser.add_argument("--source", type=Path, help="folder with the data set's files: no hub")
    options = parser.parse_args(arguments)
    story = STORIES[options.story]
    try:
        dealt = make_story(
            story, options.out, options.sites, options.seed, options.partition, options.source
        )
    except FedqloraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(describe(dealt, story.label))
    return 0


if __name__ == "__main__":
    sys.exit(main())
