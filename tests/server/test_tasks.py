"""R[i, j] and what follows from it, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedqlora.config import RunConfig
from server.task_table import matrix_rows, render_tasks, summary_rows, task_section
from server.tasks import Tasks, assemble
from tests.server.conftest import run_config

#                      on a  on b  on c
R = ((0.80, 0.30, None),  # after a
     (0.60, 0.90, 0.20),  # after b
     (0.70, 0.50, 1.00))  # after c  # fmt: skip
THREE = Tasks(
    names=("a", "b", "c"),
    figure="chapter",
    matrix=R,
    untuned=(0.10, 0.20, 0.15),
    general=(0.90, 0.85, 0.80, 0.75),
)


def test_the_figures_of_three_tasks_are_those_worked_by_hand() -> None:
    assert THREE.average == pytest.approx((0.70 + 0.50 + 1.00) / 3)
    # R[c, a] - R[a, a] and R[c, b] - R[b, b]
    assert THREE.backward_transfer == pytest.approx(((0.70 - 0.80) + (0.50 - 0.90)) / 2)
    # The best of a was 0.8 (after a), of b 0.9 (after b); now 0.7 and 0.5.
    assert THREE.forgotten == {"a": pytest.approx(0.10), "b": pytest.approx(0.40)}
    assert THREE.forgetting == pytest.approx(0.25)
    # R[a, b] - untuned b and R[b, c] - untuned c
    assert THREE.forward_transfer == pytest.approx(((0.30 - 0.20) + (0.20 - 0.15)) / 2)
    assert THREE.general_loss == pytest.approx(0.15)


def test_a_task_that_got_better_later_was_not_forgotten() -> None:
    better = Tasks(
        names=("a", "b"), figure="x", matrix=((0.5, 0.1), (0.6, 0.9)), untuned=(0.0, 0.0)
    )
    assert better.forgotten == {"a": pytest.approx(-0.1)}
    assert better.backward_transfer == pytest.approx(0.1)


def test_one_task_has_an_average_and_nothing_to_forget() -> None:
    one = Tasks(names=("a",), figure="x", matrix=((0.5,),), untuned=(0.1,))
    assert one.average == 0.5
    assert (one.backward_transfer, one.forgetting, one.forward_transfer) == (None, None, None)
    assert one.general_loss is None


def test_a_task_that_nobody_scored_before_it_was_learned_has_no_forward_transfer() -> None:
    unseen = Tasks(
        names=("a", "b"), figure="x", matrix=((0.5, None), (0.6, 0.9)), untuned=(0.0, None)
    )
    assert unseen.forward_transfer is None
    assert unseen.forgetting == pytest.approx(-0.1)


def chained(**continual: object) -> RunConfig:
    own: dict[str, object] = {"task": "b", "earlier": ["a"], "starts_from": "run-a", **continual}
    return run_config(sections={"continual": own})


def scores(a: float, b: float | None, answer: float = 0.5) -> dict[str, dict[str, float]]:
    found = {"a": {"examples": 9.0, "loss": 1.0, "chapter": a, "category": a / 10}}
    if b is not None:
        found["b"] = {"examples": 9.0, "loss": 1.0, "chapter": b, "category": b / 10}
    return {**found, "general": {"examples": 20.0, "loss": 2.0, "answer": answer}}


BEFORE: dict[str, Any] = {
    "untuned": scores(0.1, None, 0.9),
    "learned": [{"run": "run-a", "task": "a", "scores": scores(0.8, None, 0.8)}],
}


def test_a_runs_matrix_is_made_of_what_the_runs_before_it_scored_and_its_own_rounds() -> None:
    own = {0: scores(0.8, 0.3, 0.8), 4: scores(0.6, 0.9, 0.7)}
    tasks = assemble(chained(figure="chapter"), own, BEFORE)
    assert tasks is not None
    # Task b had no held-out file when a was learned: its own round 0 says what a was worth there.
    assert tasks.matrix == ((0.8, 0.3), (0.6, 0.9))
    assert tasks.untuned == (0.1, None)
    assert tasks.general == (0.9, 0.8, 0.7)
    first = assemble(chained(), own, BEFORE)
    assert first is not None
    assert first.figure == "category", "the first accuracy by name where none is named"


def test_tasks_without_a_file_each_are_not_compared() -> None:
    own = {4: scores(0.6, None)}
    assert assemble(chained(), own, BEFORE) is None
    assert assemble(chained(), {}, BEFORE) is None
    assert assemble(chained(figure="other"), {4: scores(0.6, 0.9)}, BEFORE) is None
    assert assemble(chained(), {4: scores(0.6, 0.9)}, {}) is None, "tasks.json is gone"


def test_the_tables_show_the_matrix_and_leave_out_what_is_not_known() -> None:
    assert matrix_rows(THREE) == [
        ["chapter after", "a", "b", "c", "plain questions"],
        ["untuned base", "0.100", "0.200", "0.150", "0.900"],
        ["a", "0.800", "0.300", "", "0.850"],
        ["b", "0.600", "0.900", "0.200", "0.800"],
        ["c", "0.700", "0.500", "1.000", "0.750"],
    ]
    head, row = summary_rows(THREE)
    assert dict(zip(head, row, strict=True)) == {
        "after": "c", "average": "0.733", "backward transfer": "-0.250", "forgetting": "0.250",
        "forward transfer": "0.075", "lost on plain questions": "0.150",
    }  # fmt: skip
    assert "| b             | 0.600 | 0.900 | 0.200 |" in render_tasks(THREE)
    page = task_section(THREE)
    assert "0.900" in page
    assert "<svg" in page
    assert task_section(None) == ""
