"""Frozen: what earlier tasks left beside the adapter stays as it is, whatever the method."""

from __future__ import annotations

from dataclasses import replace

from fedqlora.adapter import Adapter
from server.aggregation.aggregate import Aggregate, Aggregator


class Frozen:
    """A method that knows no residual, with one beside it.

    Args:
        method: aggregates the adapter.
        residual: what lies frozen beside it.
    """

    def __init__(self, method: Aggregator, residual: Adapter) -> None:
        self._method = method
        self._residual = residual

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """As the method.

        Raises:
            UpdateError: as the method.
        """
        self._method.add(site, delta, weight)

    def finish(self) -> Aggregate:
        """The method's result, with the residual as it was.

        Raises:
            UpdateError: as the method.
        """
        return replace(self._method.finish(), residual=self._residual)
