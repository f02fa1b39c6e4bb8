"""Table: the demo's result as markdown, one row a model, one group of columns a held-out subset."""

from __future__ import annotations

from collections.abc import Mapping

Scores = Mapping[str, Mapping[str, float]]
SUBSETS = {"codes": "unseen codes", "wordings": "unseen wordings"}
COLUMNS = {"chapter": "chapter accuracy", "category": "category exact", "loss": "loss"}


def render(rows: Mapping[str, Scores]) -> str:
    """The table of models and their scores.

    Args:
        rows: a model's name -> what `fedqlora.engine.evaluate.evaluate` gave for it.

    Returns:
        Markdown, columns padded so that it reads well in a terminal too; the number of
        examples stands in the head.
    """
    counts = {
        subset: int(scores[subset]["examples"])
        for scores in rows.values()
        for subset in SUBSETS
        if subset in scores
    }
    shown = [subset for subset in SUBSETS if subset in counts]
    head = ["model"]
    for subset in shown:
        first, *others = COLUMNS.values()
        head += [f"{SUBSETS[subset]} ({counts[subset]}): {first}", *others]
    lines = [head]
    for name, scores in rows.items():
        cells = [name]
        for subset in shown:
            own = scores.get(subset, {})
            cells += [f"{own[key]:.3f}" if key in own else "" for key in COLUMNS]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
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
