"""Aggregate: what a round's updates became, and what every way of aggregation offers."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedqlora.adapter import Adapter
from fedqlora.errors import UpdateError


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """The result of a round.

    Attributes:
        adapter: what the sites train next.
        residual: what they load beside it, frozen, with scale 1; empty if there is none.
        figures: norms that the round's metrics record.
        set_aside: sites whose valid updates did not count, by name.
        memory: what the next round's aggregation needs beside both, such as moments.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()
    memory: Adapter = field(default_factory=dict)


class Aggregator(Protocol):
    """Takes the updates of one round as they arrive.

    Guarantee: the order of arrival does not change a bit of the result.
    """

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Take one site's validated delta of the tensors that trained.

        Raises:
            UpdateError: the weight is not positive or the delta is out of range; nothing of it
                was taken.
        """

    def finish(self) -> Aggregate:
        """The round's result.

        Raises:
            UpdateError: no update was taken.
        """


def check_weight(site: str, weight: int) -> None:
    """Refuse a weight that would not count.

    Raises:
        UpdateError: it is not positive.
    """
    if weight < 1:
        raise UpdateError(
            f"site {site}'s update has weight {weight}; it needs at least one example"
        )


def check_first(site: str, seen: Container[str]) -> None:
    """Refuse a site's second update of a round.

    Raises:
        UpdateError: the site is among those seen.
    """
    if site in seen:
        raise UpdateError(f"site {site} sent a second update in one round; it counts once")


def keep_update(
    updates: dict[str, tuple[Adapter, int]], site: str, delta: Adapter, weight: int
) -> None:
    """Hold a site's update until the round is finished; see Aggregator.add.

    Raises:
        UpdateError: the weight is not positive, or the site has sent one already.
    """
    check_weight(site, weight)
    check_first(site, updates)
    updates[site] = (delta, weight)
