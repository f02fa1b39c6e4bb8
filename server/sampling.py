"""Sampling: which of the sites that are here take part in a round."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from fedqlora.config import RunConfig


def sample_sites(config: RunConfig, round_: int, sites: Iterable[str]) -> set[str]:
    """As many as the run asks for, at least `min_sites`; all where there are no more.

    Seed, round and name decide, so a resumed run asks the same sites, and one that is away changes
    nobody's place but the next one's.

    Args:
        config: seed, and how many.
        round_: from 1.
        sites: names of the usable ones.
    """
    order = sorted(sites, key=lambda site: _place(config.seed, round_, site))
    settings = config.federation
    wanted = settings.sample_sites or math.ceil(settings.sample_fraction * len(order))
    return set(order[: max(wanted, settings.min_sites)])


def _place(seed: int, round_: int, site: str) -> bytes:
    return hashlib.sha256(f"{seed}:{round_}:{site}:sample".encode()).digest()
