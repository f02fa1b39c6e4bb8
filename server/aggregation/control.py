"""Control variates of SCAFFOLD at the centre: the mean of the sites' own.

Karimireddy et al., arXiv 1910.06378: c <- c + |S| / N times the mean change over the S of N sites
that took part. Summed in fixed point, as FedAvg: no bit depends on the order of arrival.
"""

from __future__ import annotations

import numpy as np

from fedqlora.adapter import Adapter, AdapterSpec
from server.aggregation.fedavg import FedAvg

_KEPT = "control/"


def select_control(memory: Adapter, spec: AdapterSpec) -> Adapter:
    """The sites' mean gradient that a round left; zero before the first."""
    return {
        name: memory.get(_KEPT + name, np.zeros(shape, dtype=np.float32))
        for name, shape in spec.shapes
    }


class ControlMean:
    """Takes the changes of the sites' control variates.

    Args:
        control: the mean so far, of what trains.
        registered: N, the sites that the run counts on.
    """

    def __init__(self, control: Adapter, registered: int) -> None:
        self._control = control
        self._registered = registered
        self._changes = FedAvg({name: np.zeros_like(value) for name, value in control.items()})
        self._sites = 0

    def add(self, site: str, change: Adapter) -> None:
        """Fold in one site's change.

        Raises:
            UpdateError: a value is out of range; nothing was folded in.
        """
        self._changes.add(site, change, 1)
        self._sites += 1

    def finish(self) -> Adapter:
        """The new mean, named as a memory.

        Raises:
            UpdateError: no change was taken.
        """
        mean = self._changes.finish().adapter
        share = np.float32(self._sites / max(self._registered, self._sites))
        return {_KEPT + name: value + share * mean[name] for name, value in self._control.items()}
