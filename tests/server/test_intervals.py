"""Intervals, against values from tables, and runs of several seeds in one row."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.comparison import read_runs, render_text
from server.intervals import half_width, is_accuracy, say
from tests.server.test_report import make_run


@pytest.mark.parametrize(
    ("share", "rows", "half"),
    [
        # Wilson's interval of 0 of 10 ends at 0.2775, of 5 of 10 it is 0.2366 to 0.7634.
        (0.0, 10, 0.2775 / 2),
        (0.5, 10, (0.7634 - 0.2366) / 2),
        (1.0, 10, 0.2775 / 2),
    ],
)
def test_an_accuracys_interval_is_wilsons(share: float, rows: int, half: float) -> None:
    figures = {"examples": rows, "chapter": share, "loss": 1.0}
    assert half_width(figures, "chapter") == pytest.approx(half, abs=1e-4)


def test_a_means_interval_comes_from_its_standard_error_and_is_left_out_without() -> None:
    figures = {"examples": 10, "loss": 2.0, "loss_error": 0.1, "rougeL": 0.5}
    assert half_width(figures, "loss") == pytest.approx(0.196)
    assert half_width(figures, "rougeL") is None
    assert say(2.0, 0.196) == "2.000 ± 0.196"
    assert say(0.5, None) == "0.500"
    assert [name for name in (*figures, "chapter") if is_accuracy(name)] == ["chapter"]


def test_runs_that_differ_by_seed_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=seed, rounds=seed) for seed in (1, 2)]
    # Another number of rounds is another experiment.
    assert "over seeds" not in render_text(read_runs([run.path for run in runs]))
    seeds = [make_run(tmp_path, seed=seed, loss=2.0 + seed) for seed in (1, 2, 3)]
    said = render_text(read_runs([run.path for run in (*seeds, runs[0])]))
    row = [cell.strip() for cell in said.splitlines()[-1].strip("|").split("|")]
    assert row[1] == "1, 2, 3"
    # Losses 1, 2 and 3 after two rounds.
    assert row[-1] == "2.000 ± 1.000"
