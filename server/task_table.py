"""Task table: what a chain of tasks has kept, as markdown for the result and for the report."""

from __future__ import annotations

from server.charts import Series, lines
from server.markup import Markup, element, join, table
from server.page import charts
from server.table import align
from server.tasks import Tasks


def matrix_rows(tasks: Tasks) -> list[list[str]]:
    """Head and rows of R: the untuned base, then one row after each task."""
    asked = any(value is not None for value in tasks.general)
    head = [f"{tasks.figure} after", *tasks.names, *(["plain questions"] if asked else [])]
    rows = [["untuned base", *map(_cell, tasks.untuned)]]
    rows += [[name, *map(_cell, row)] for name, row in zip(tasks.names, tasks.matrix, strict=True)]
    if asked:
        rows = [[*row, _cell(value)] for row, value in zip(rows, tasks.general, strict=True)]
    return [head, *rows]


def summary_rows(tasks: Tasks) -> list[list[str]]:
    """Head and row of the figures that follow from R."""
    figures = {
        "average": tasks.average,
        "backward transfer": tasks.backward_transfer,
        "forgetting": tasks.forgetting,
        "forward transfer": tasks.forward_transfer,
        "lost on plain questions": tasks.general_loss,
    }
    known = {name: value for name, value in figures.items() if value is not None}
    return [["after", *known], [tasks.names[-1], *map(_cell, known.values())]]


def render_tasks(tasks: Tasks) -> str:
    """Both tables as markdown."""
    return f"{align(matrix_rows(tasks))}\n\n{align(summary_rows(tasks))}"


def task_section(tasks: Tasks | None) -> Markup:
    """Both tables and a picture for the report; nothing for a run that continues none."""
    if tasks is None or len(tasks.names) < 2:
        return Markup("")
    pictures = lines(
        f"Held-out {tasks.figure} by task",
        [
            Series(
                name=name,
                points=[
                    (float(place), row[j])
                    for place, row in enumerate((tasks.untuned, *tasks.matrix))
                ],
            )
            for j, name in enumerate(tasks.names)
        ],
        x="tasks learned",
        y=tasks.figure,
    )
    matrix, summary = matrix_rows(tasks), summary_rows(tasks)
    note = "Row: after which task. Column: on which task's held-out file."
    return join(
        [
            table(matrix[0], matrix[1:], label="accuracy by task"),
            element("p", note, class_="soft"),
            table(summary[0], summary[1:], label="what was kept of earlier tasks"),
            charts(pictures),
        ]
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
