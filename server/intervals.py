"""Intervals: how far a held-out score may be from that of all such texts, at 95 %.

An accuracy's is Wilson's (1927), which holds near 0 and 1 too; it follows from the number of rows.
That of a mean over rows (loss, ROUGE) is 1.96 times the standard error that the evaluator told.
Neither knows how much another seed would have changed: a comparison of seeds does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_Z = 1.96
ERROR = "_error"
"""Ends the name of a standard error, which stands beside its figure."""
NO_ACCURACY = ("examples", "loss", "perplexity", "rouge1", "rouge2", "rougeL")


def is_accuracy(metric: str) -> bool:
    """Whether a figure is a share of right answers."""
    return metric not in NO_ACCURACY and not metric.endswith(ERROR)


def half_width(figures: Mapping[str, float], metric: str) -> float | None:
    """Half the width of a figure's interval; None where nothing is known about it.

    Args:
        figures: of one held-out file.
        metric: one of their names.
    """
    if (error := figures.get(metric + ERROR)) is not None:
        return _Z * error
    rows = figures.get("examples", 0)
    if not is_accuracy(metric) or rows < 1:
        return None
    share = figures[metric]
    spread = share * (1 - share) / rows + _Z**2 / (4 * rows**2)
    return _Z * math.sqrt(spread) / (1 + _Z**2 / rows)


def say(value: float, half: float | None) -> str:
    """A figure with its interval, as `0.801 ± 0.045`."""
    return f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}"
