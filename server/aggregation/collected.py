"""Collected: a round's updates held until the last, and what a rule makes of them.

Memory grows with the number of sites. A rule turns the updates into those that the method then
takes its mean of: some of them, all with other weights, or one that was made of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedqlora.adapter import Adapter
from fedqlora.errors import UpdateError
from server.aggregation.aggregate import Aggregate, Aggregator, keep_update

Updates = Mapping[str, tuple[Adapter, int]]
"""Site -> its delta and weight, in the order of the sites' names."""


class Collected:
    """Holds the updates of one round.

    Args:
        start: makes the method's aggregator, with nothing folded in.
        rule: what the method is given instead of all updates; a name that no site has stands
            for an update made of many.
    """

    def __init__(self, start: Callable[[], Aggregator], rule: Callable[[Updates], Updates]) -> None:
        self._start = start
        self._rule = rule
        self._updates: dict[str, tuple[Adapter, int]] = {}

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Keep one site's delta; see Aggregator.

        Raises:
            UpdateError: the weight is not positive, or the site has sent one already.
        """
        keep_update(self._updates, site, delta, weight)

    def finish(self) -> Aggregate:
        """What the method makes of what the rule gives it.

        Raises:
            UpdateError: no update was taken, or fewer than the rule needs.
        """
        return self._aggregate(dict(sorted(self._updates.items())))

    def finish_without(self, site: str) -> Aggregate:
        """The same without one site's update.

        Raises:
            UpdateError: no other was taken, or fewer than the rule needs.
        """
        others = {name: own for name, own in sorted(self._updates.items()) if name != site}
        return self._aggregate(others)

    def _aggregate(self, updates: Updates) -> Aggregate:
        if not updates:
            raise UpdateError("no update was taken; a round needs at least one")
        aggregator = self._start()
        chosen = self._rule(updates)
        counted = set(updates) if chosen.keys() - updates.keys() else set(chosen)
        for name, (delta, weight) in chosen.items():
            try:
                aggregator.add(name, delta, weight)
            except UpdateError:
                # One site's number out of range does not end everybody's round.
                counted.discard(name)
        return replace(aggregator.finish(), set_aside=tuple(sorted(updates.keys() - counted)))
