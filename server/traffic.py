"""Traffic: the bytes of a run's rounds, as the envelopes that were sent and received had them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def describe_traffic(events: Iterable[Mapping[str, Any]]) -> str:
    """One line: bytes down to all sites and up from them in a round, on average; or nothing yet.

    Args:
        events: the lines of a run's metrics; those of sites count, also where a reply was
            refused.
    """
    events = list(events)
    sites = [event for event in events if event["event"] == "site"]
    if not sites:
        return ""
    rounds = len({event["round"] for event in sites})
    # Under secure aggregation a round has two more exchanges, which open its sum.
    opened = [event for event in events if "opening_bytes_up" in event]
    down = sum(event["bytes_down"] for event in sites)
    down += sum(event["opening_bytes_down"] for event in opened)
    up = sum(event["bytes_up"] for event in sites)
    up += sum(event["opening_bytes_up"] for event in opened)
    down, up = down / rounds, up / rounds
    return f"Each round, all sites together: {_megabytes(down)} down, {_megabytes(up)} up."


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
