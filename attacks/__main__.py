"""Every attack on the demo's model and records: prints a table, writes a page."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from attacks.page import Findings, render_findings, render_text
from attacks.setting import Setting
from attacks.sites import Rows
from attacks.trials import Secret, try_audit, try_memory, try_span
from demo.data import make_data
from demo.hospitals import Hospitals
from demo.model import MODELS, NAME
from fedqlora.config import load_run
from fedqlora.errors import FedqloraError
from fedqlora.files import write_durably
from server.bundle import REPOSITORY

SMALL = "tiny-llama"
SITES = ("a", "b", "c")
TEXTS = 8
MEMBERS, OTHERS = 64, 100
NAMES = ("Miller", "Okafor", "Lindqvist")
CANARIES = 1000

_Found = TypeVar("_Found")


def main(arguments: list[str] | None = None) -> int:
    """Run all attacks; returns 1 if the audit refutes the promise."""
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("--epsilon", type=float, default=2.0, help="promise of the private runs")
    parser.add_argument("--out", type=Path, default=Path("build/attacks.html"), help="the page")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = attack(Path(folder), options.epsilon)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(options.out, render_findings(found).encode())
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    print(f"\n{render_text(found)}\n\npage: {options.out}")
    if found.broken:
        sys.stderr.write("the audit's lower bound is above the promised epsilon; do not release\n")
        return 1
    return 0


def attack(folder: Path, epsilon: float) -> Findings:
    """All attacks on the demo's hospitals.

    Args:
        folder: empty, for what the sites keep.
        epsilon: the promise of the private runs.
    """
    run = load_run(REPOSITORY / "experiments" / "icd10.toml")
    hospitals = Hospitals(run, len(SITES), REPOSITORY)
    for name in (NAME, SMALL):
        MODELS[name](hospitals.models / name)
    if not hospitals.data.exists():
        make_data(hospitals.data, len(SITES), run.seed)
    # A policy allows this rank; three layers read the first inputs, so 96 tokens can be told.
    large = Setting(folder=folder, models=hospitals.models, base=NAME, epsilon=epsilon, rank=32)
    demo = Setting(folder=folder, models=hospitals.models, base=NAME, epsilon=epsilon)
    small = Setting(folder=folder, models=hospitals.models, base=SMALL, epsilon=epsilon)
    drawn = {name: draw_texts(hospitals, name, MEMBERS + OTHERS) for name in SITES}
    recovered = timed(
        "span test", lambda: try_span(large, {name: rows[:TEXTS] for name, rows in drawn.items()})
    )
    remembered = timed(
        "exposure and membership",
        lambda: try_memory(
            demo,
            {name: rows[:MEMBERS] for name, rows in drawn.items()},
            drawn["a"][MEMBERS:],
            [make_secret(name) for name in NAMES],
            training={"steps": 40, "batch_examples": 8, "learning_rate": 2e-3},
            repeats=4,
        ),
    )
    canaries = {name: make_canaries(hospitals, name) for name in SITES}
    audited = timed(
        "one-run audit",
        lambda: try_audit(small, canaries["a"], {name: canaries[name] for name in SITES[1:]}),
    )
    return Findings(
        base=NAME,
        small=SMALL,
        epsilon=epsilon,
        delta=demo.delta,
        recovered=recovered,
        remembered=remembered,
        audited=audited,
    )


def draw_texts(hospitals: Hospitals, site: str, count: int) -> Rows:
    """Some texts of a hospital, a patient each; the same ones each time."""
    lines = (hospitals.records(site) / "records.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in random.Random(site).sample(lines, count)]  # noqa: S311
    return [
        {"prompt": row["prompt"], "completion": row["completion"], "patient_id": f"{site}-{number}"}
        for number, row in enumerate(rows)
    ]


def make_secret(name: str) -> Secret:
    """A patient's number of six digits, and 127 others that it could have been."""
    numbers = random.Random(name).sample(range(100_000, 1_000_000), 128)  # noqa: S311
    secret, *others = (f" {number}" for number in numbers)
    row = {"prompt": f"Insurance number of {name}:", "completion": secret, "patient_id": name}
    return Secret(row=row, candidates=others)


def make_canaries(hospitals: Hospitals, site: str) -> Rows:
    """Texts of random words out of the hospitals' own, a patient each."""
    texts = (hospitals.records("a") / "records.jsonl").read_text(encoding="utf-8")
    words = sorted({word for word in texts.split() if word.isalpha()})
    generator = random.Random(site)  # noqa: S311 - made-up texts
    return [
        {
            "prompt": " ".join(generator.choices(words, k=2)),
            "completion": " " + " ".join(generator.choices(words, k=3)),
            "patient_id": f"{site}-{number}",
        }
        for number in range(CANARIES)
    ]


def timed(name: str, trial: Callable[[], _Found]) -> _Found:
    """Carry out a trial and say how long it took."""
    started = time.perf_counter()
    found = trial()
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
