"""Halves: which of A and B train in a round, and so which travel from a site.

Both sides work it out from the signed configuration and round: an instruction cannot say one
thing and mean another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from fedqlora.adapter import A_PART, B_PART, Adapter, AdapterSpec

Method = Literal["exact_svd", "fedavg", "ffa", "fedsvd", "rolora"]


def select_trained(names: Iterable[str], method: Method, round_: int) -> tuple[str, ...]:
    """Names of the adapter's tensors that train in a round, in the order given.

    Args:
        names: the adapter's tensors.
        method: the run's aggregation.
        round_: from 1. `rolora` starts with B: while B is zero, A has no gradient.
    """
    if method in ("exact_svd", "fedavg"):
        return tuple(names)
    half = A_PART if method == "rolora" and round_ % 2 == 0 else B_PART
    return tuple(name for name in names if half in name)


def trained_spec(adapter: Adapter, method: Method, round_: int) -> AdapterSpec:
    """Names and shapes of the adapter's tensors that train in a round; see `select_trained`."""
    names = select_trained(adapter, method, round_)
    return AdapterSpec.of({name: adapter[name] for name in names})
