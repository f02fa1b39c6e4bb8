"""Table: a run's result as markdown, one row a model, one group of columns a held-out file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Scores = Mapping[str, Mapping[str, float]]
"""Held-out file -> figure -> value, as `fedqlora.engine.evaluate.evaluate` gives it."""

_ALL = "all"  # every file together: shown file by file instead
_NO_ACCURACY = ("examples", "loss")


def render(rows: Mapping[str, Scores]) -> str:
    """The table of models and their scores: for each held-out file the accuracies, then the loss.

    Args:
        rows: a model's name -> its scores.

    Returns:
        Markdown, columns padded so that it reads well in a terminal too; the number of
        examples stands in the head.
    """
    groups: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for scores in rows.values():
        for name, figures in scores.items():
            if name != _ALL and name not in groups:
                groups[name] = [*sorted(figures.keys() - set(_NO_ACCURACY)), "loss"]
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
    return align(lines)


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
