"""Units: numbers, bytes and seconds as a person reads them."""

from __future__ import annotations

import math

MEGABYTE = 1e6
"""Bytes, in units of 1000."""


def megabytes(value: float) -> str:
    """Bytes for a person, in units of 1000."""
    return f"{value / MEGABYTE:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers, evenly spaced, that span both values."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1.0) / 2 * (low != 0), high + (abs(high) or 1.0) / 2
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def figure(value: float) -> str:
    """A number as short as it can be read: four digits that count."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"
