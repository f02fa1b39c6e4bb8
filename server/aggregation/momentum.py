"""Momentum of the products: FedAvgM where factors are made anew each round.

Hsu et al., arXiv 1909.06335, on W = s B A + residual instead of on A and B: V <- beta V + mean - W,
then W <- W + rate V. V is kept as factors of its own. Momentum kept on A and B would point nowhere
after an SVD has turned them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedqlora.adapter import Adapter
from server.aggregation.factors import Layer, Matrix, Product, decompose

_KEPT = "momentum/"


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """What earlier rounds left, and how it counts.

    Attributes:
        beta: share of V that stays.
        rate: factor of V in the movement.
        rank: largest rank of V per layer; what is beyond is dropped.
        memory: V of the round before, by layer; empty at first.
    """

    beta: float
    rate: float
    rank: int
    memory: Adapter

    def move(self, layer: Layer, present: Product, mean: Product, memory: Adapter) -> Product:
        """The product after the step, as a sum of products; the new V goes into `memory`.

        Args:
            layer: names A and B.
            present: W, as matrices whose products sum to it.
            mean: the mean of the sites' products, likewise.
            memory: takes V of the next round.
        """
        lefts, rights = _times(self.beta, *self._velocity(layer))
        lefts += mean[0] + [-left for left in present[0]]
        rights += mean[1] + present[1]
        u, s, v = decompose(lefts, rights)
        root = np.sqrt(s[: self.rank])
        memory[_KEPT + layer.a] = (root[:, np.newaxis] * v[: self.rank]).astype(np.float32)
        memory[_KEPT + layer.b] = (u[:, : self.rank] * root).astype(np.float32)
        moved, along = _times(self.rate, lefts, rights)
        return present[0] + moved, present[1] + along

    def _velocity(self, layer: Layer) -> Product:
        if not self.memory:
            return [], []
        left, right = self.memory[_KEPT + layer.b], self.memory[_KEPT + layer.a]
        return [left.astype(np.float64)], [right.astype(np.float64)]


def _times(factor: float, lefts: Sequence[Matrix], rights: Sequence[Matrix]) -> Product:
    return [factor * left for left in lefts], list(rights)
