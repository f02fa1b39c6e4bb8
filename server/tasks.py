"""Tasks: R[i, j], the accuracy on task j after task i, and what follows from it.

Average, backward and forward transfer are Lopez-Paz and Ranzato's (arXiv 1706.08840), forgetting is
Chaudhry et al.'s (arXiv 1801.10112). A task's accuracy is that of its own file in the held-out set.
A run knows the rows before its own from `tasks.json`, which `continue` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedqlora.config import RunConfig
from server.intervals import is_accuracy

Scores = Mapping[str, Mapping[str, float]]
"""Held-out file -> figure -> value."""

GENERAL = "general"
"""Where the evaluator puts the scores of its plain questions."""
FILE = "tasks.json"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The tasks that one adapter has learned in turn, T of them."""

    names: tuple[str, ...]
    """In the order in which they were learned."""
    figure: str
    """The accuracy that is compared."""
    matrix: tuple[tuple[float | None, ...], ...]
    """(T, T): row i after task i, column j on task j; None above the diagonal where nobody looked,
    never on it or below."""
    untuned: tuple[float | None, ...]
    """(T,) accuracy on each task before any."""
    general: tuple[float | None, ...] = ()
    """(1 + T,) accuracy on plain questions, before any task and after each; None: not asked."""

    @property
    def average(self) -> float:
        """Mean accuracy on all tasks after the last."""
        return _mean(self._final)

    @property
    def backward_transfer(self) -> float | None:
        """What later tasks did to earlier ones: mean of R[T, j] - R[j, j]; None for one task."""
        changes = [now - _known(self.matrix[j][j]) for j, now in enumerate(self._final[:-1])]
        return _mean(changes) if changes else None

    @property
    def forgotten(self) -> dict[str, float]:
        """Earlier task -> the best accuracy that it ever had before this task, minus now's."""
        return {
            name: max(_known(row[j]) for row in self.matrix[j:-1]) - self._final[j]
            for j, name in enumerate(self.names[:-1])
        }

    @property
    def forgetting(self) -> float | None:
        """Mean of `forgotten`; None for one task."""
        lost = list(self.forgotten.values())
        return _mean(lost) if lost else None

    @property
    def forward_transfer(self) -> float | None:
        """How much earlier tasks helped one before it was learned: mean of R[j-1, j] - untuned.

        None for one task, or where some task was not scored before it was learned.
        """
        pairs = [(self.matrix[j - 1][j], self.untuned[j]) for j in range(1, len(self.names))]
        gains = [now - was for now, was in pairs if now is not None and was is not None]
        return _mean(gains) if gains and len(gains) == len(pairs) else None

    @property
    def general_loss(self) -> float | None:
        """What is lost on plain questions since the untuned base; None where not asked."""
        first, last = (self.general[0], self.general[-1]) if self.general else (None, None)
        return None if first is None or last is None else first - last

    @property
    def _final(self) -> list[float]:
        return [_known(value) for value in self.matrix[-1]]


def assemble(
    config: RunConfig, scores: Mapping[int, Scores], before: Mapping[str, Any]
) -> Tasks | None:
    """The tasks of a run and of those that it continues; None where they cannot be compared.

    Args:
        config: the run.
        scores: its held-out scores by round.
        before: what `tasks.json` holds; empty for a run that continues none.
    """
    if not scores:
        return None
    first, last = scores[min(scores)], scores[max(scores)]
    names = (*config.continual.earlier, config.task)
    rows: list[Scores] = [one["scores"] for one in before.get("learned", ())]
    if len(rows) != len(names) - 1:
        return None
    untuned: Scores = before.get("untuned", first)
    if rows:
        # The run began with what the task before it left, and may have more files to score by.
        rows[-1] = {**first, **rows[-1]}
    rows.append(last)
    accuracies = sorted(filter(is_accuracy, last.get(config.task, {})))
    figure = config.continual.figure or (accuracies[0] if accuracies else "")
    matrix = tuple(tuple(_find(row, name, figure) for name in names) for row in rows)
    if any(None in row[: i + 1] for i, row in enumerate(matrix)):
        return None
    return Tasks(
        names=names,
        figure=figure,
        matrix=matrix,
        untuned=tuple(_find(untuned, name, figure) for name in names),
        general=tuple(_find(row, GENERAL, "answer") for row in (untuned, *rows)),
    )


def _find(scores: Scores, name: str, figure: str) -> float | None:
    return scores.get(name, {}).get(figure)


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("an accuracy on or below the diagonal is missing")
    return value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
