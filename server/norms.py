"""Norms: each update's against the running medians of those that earlier rounds used."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from fedqlora.errors import UpdateError

NORMS = {
    "a_norm": "norm of A",
    "b_norm": "norm of B",
    "product_norm": "norm of B A",
    "update_norm": "norm",
}
"""Names of the norms in a `site` line of metrics.jsonl, and in a sentence."""


def running_medians(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Each norm's median over all updates used so far.

    Only earlier rounds count: a round's own updates come in any order, which must not change
    what is refused.

    Args:
        events: the lines of a run's metrics, up to the last finished round.
    """
    used = [line for line in events if line["event"] == "site" and line["outcome"] == "used"]
    found = {name: [line[name] for line in used if name in line] for name in NORMS}
    return {name: statistics.median(values) for name, values in found.items() if values}


def check_norms(norms: Mapping[str, float], medians: Mapping[str, float], ratio: float) -> None:
    """Refuse an update that is far longer than those of earlier rounds.

    Args:
        norms: the update's.
        medians: of earlier rounds; one of zero says nothing (A has no gradient while B is zero).
        ratio: how many times the median is too much.

    Raises:
        UpdateError: names the first norm that is.
    """
    for name, value in norms.items():
        usual = medians.get(name, 0.0)
        if 0 < usual * ratio < value:
            raise UpdateError(
                f"update's {NORMS[name]} is {value:.4g}, over aggregation.max_norm_ratio = "
                f"{ratio:g} times the median of earlier rounds ({usual:.4g})"
            )
