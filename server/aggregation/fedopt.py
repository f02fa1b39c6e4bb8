"""FedOpt: server optimizers on A and B, for methods in which those stay what they were.

FedAvgM: Hsu et al., arXiv 1909.06335. FedAdam and FedYogi: Reddi et al., arXiv 2003.00295, with
Adam's correction of its first rounds (arXiv 1412.6980), as in Flower. The mean of a round minus
its start is what an optimizer takes for a negative gradient.

Flower's strategies of these names keep the moments in their own attributes, where no checkpoint
finds them, and take replies instead of a mean; the tests hold these numbers to theirs (whose
FedAdam counts its rounds from one too many).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, FloatArray, subtract
from fedqlora.server_optimizer_config import ServerOptimizerConfig
from server.aggregation.aggregate import Aggregate, Aggregator

FIRST, SECOND, STEPS = "first/", "second/", "steps"


class FedOpt:
    """Moves the adapter by an optimizer's step instead of to the mean.

    Args:
        aggregator: gives the mean.
        adapter: the round's starting point.
        trained: names of the tensors that trained; the others stay.
        config: the optimizer.
        memory: what it carried out of the round before; empty at first.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        adapter: Adapter,
        trained: Collection[str],
        config: ServerOptimizerConfig,
        memory: Adapter,
    ) -> None:
        self._aggregator = aggregator
        self._before = {name: adapter[name] for name in trained}
        self._config = config
        self._memory = memory

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Fold in one site's delta; see Aggregator.

        Raises:
            UpdateError: as the method's aggregator.
        """
        self._aggregator.add(site, delta, weight)

    def finish(self) -> Aggregate:
        """The adapter after the optimizer's step, and its moments.

        Raises:
            UpdateError: no update was taken.
        """
        mean = self._aggregator.finish()
        changes = subtract({name: mean.adapter[name] for name in self._before}, self._before)
        steps = 1 + int(self._memory[STEPS][0]) if self._memory else 1
        memory: Adapter = {STEPS: np.array([steps], dtype=np.float32)}
        moved: Adapter = {}
        for name, change in changes.items():
            moved[name] = self._before[name] + self._step(name, change, steps, memory)
        return replace(mean, adapter={**mean.adapter, **moved}, memory=memory)

    def _step(self, name: str, change: FloatArray, steps: int, memory: Adapter) -> FloatArray:
        """One tensor's movement; its new moments go into `memory`."""
        config = self._config
        first = self._memory.get(FIRST + name, np.zeros_like(change))
        if config.name == "momentum":
            memory[FIRST + name] = _single(config.momentum * first + change)
            return _single(config.rate * memory[FIRST + name])
        first = _single(config.momentum * first + (1 - config.momentum) * change)
        second = self._memory.get(SECOND + name, np.zeros_like(change)).astype(np.float64)
        square = np.square(change, dtype=np.float64)
        rate = config.rate
        if config.name == "adam":
            second = config.second_moment * second + (1 - config.second_moment) * square
            rate *= np.sqrt(1 - config.second_moment**steps) / (1 - config.momentum**steps)
        else:
            second = second - (1 - config.second_moment) * square * np.sign(second - square)
        memory[FIRST + name], memory[SECOND + name] = first, _single(second)
        return _single(rate * first / (np.sqrt(memory[SECOND + name]) + config.tau))


def _single(value: NDArray[np.floating[Any]]) -> FloatArray:
    return value.astype(np.float32)
