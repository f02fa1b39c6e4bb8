"""Table: a run's result as markdown, one row a model, one group of columns a held-out file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.intervals import ERROR, half_width

Scores = Mapping[str, Mapping[str, float]]
"""Held-out file -> figure -> value, as `fedqlora.engine.evaluate.evaluate` gives it."""

_LAST = ("examples", "loss")
_ALL = "all"  # every file together: shown file by file instead


def render(rows: Mapping[str, Scores]) -> str:
    """The table of models and their scores: for each held-out file the accuracies, then the loss.

    Args:
        rows: a model's name -> its scores.

    Returns:
        Markdown, columns padded so that it reads well in a terminal too; the number of
        examples stands in the head, and under the table how sure the scores are.
    """
    groups: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for scores in rows.values():
        for name, figures in scores.items():
            if name != _ALL and name not in groups:
                shown = [metric for metric in sorted(figures) if not metric.endswith(ERROR)]
                groups[name] = [*(m for m in shown if m not in _LAST), "loss"]
                counts[name] = int(figures["examples"])
    head = ["model"]
    for name, (first, *others) in groups.items():
        head += [f"held-out {name} ({counts[name]}): {first}", *others]
    lines = [head]
    for model, scores in rows.items():
        cells = [model]
        for name, columns in groups.items():
            own = scores.get(name, {})
            cells += [f"{own[column]:.3f}" if column in own else "" for column in columns]
        lines.append(cells)
    return "\n\n".join([align(lines), *_widths(rows, groups)])


def _widths(rows: Mapping[str, Scores], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """One line about how sure the scores are: the widest interval of each column."""
    found = []
    for name, metrics in groups.items():
        said = []
        for metric in metrics:
            own = [scores[name] for scores in rows.values() if metric in scores.get(name, {})]
            widths = [half for figures in own if (half := half_width(figures, metric)) is not None]
            if widths:
                said.append(f"{metric} ± {max(widths):.3f}")
        if said:
            found.append(f"{name}: {', '.join(said)}")
    return [f"95 % intervals are within: {'; '.join(found)}."] if found else []


def align(lines: Sequence[Sequence[str]]) -> str:
    """A markdown table whose cells are padded: the first column on the left, others on the right.

    Args:
        lines: the head, then the rows.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = [
        "-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (lines[0], rule, *lines[1:])
    )
