"""Exact SVD: the mean of the sites' products, split into a trainable and a frozen adapter.

FlexLoRA (arXiv 2402.11505) keeps the best rank-r part of the mean product. Here what that
leaves is kept as well, in a residual adapter that sites load frozen beside the trainable one,
so that the sum of both is the exact mean until the residual's own rank cap. See docs/adr/0008.
"""

from __future__ import annotations

import math

import numpy as np

from fedqlora.adapter import INITIAL_ROW_NORM, Adapter, FloatArray, rank_of
from fedqlora.errors import UpdateError
from server.aggregation.aggregate import Aggregate, keep_update
from server.aggregation.factors import Layer, Matrix, Product, decompose, pad_rank, pair_layers
from server.aggregation.momentum import Momentum


class ExactSvd:
    """Collects deltas, and aggregates them layer by layer in the order of the sites' names.

    Memory grows with the sites' factors, never with d_out x d_in. A delta of a lower rank than
    the adapter's is one of its first rows of A and columns of B (mixed ranks).

    Args:
        adapter: the round's starting point.
        residual: what lay frozen beside it, with scale 1; empty for none.
        scale: what the adapter's B A is multiplied by.
        residual_rank: the largest rank of the next residual.
        momentum: of the products, with what earlier rounds left of it; None for none.

    Raises:
        UpdateError: a tensor of the adapter is not one of a pair of matrices.
    """

    def __init__(
        self,
        adapter: Adapter,
        residual: Adapter,
        *,
        scale: float,
        residual_rank: int,
        momentum: Momentum | None = None,
    ) -> None:
        self._layers = pair_layers(adapter)
        self._adapter = adapter
        self._residual = residual
        self._scale = scale
        self._rank = rank_of(adapter)
        self._residual_rank = residual_rank
        self._momentum = momentum
        self._updates: dict[str, tuple[Adapter, int]] = {}

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Keep one site's delta; see Aggregator.

        Raises:
            UpdateError: the weight is not positive, or the site has sent one already.
        """
        keep_update(self._updates, site, delta, weight)

    def finish(self) -> Aggregate:
        """Both adapters, and the norms of the residual and of what its cap discarded.

        Raises:
            UpdateError: no update was taken.
        """
        if not self._updates:
            raise UpdateError("no update was taken; a round needs at least one")
        adapter: Adapter = {}
        residual: Adapter = {}
        memory: Adapter = {}
        kept = discarded = 0.0
        for layer in self._layers:
            product = self._mean(layer)
            if self._momentum is not None:
                product = self._momentum.move(layer, self._present(layer), product, memory)
            u, s, v = decompose(*product)
            rank, end = self._rank, self._rank + self._residual_rank
            adapter[layer.a] = pad_rank(INITIAL_ROW_NORM * v[:rank], rank, axis=0)
            left = u[:, :rank] * (s[:rank] / (INITIAL_ROW_NORM * self._scale))
            adapter[layer.b] = pad_rank(left, rank, axis=1)
            # Singular values at the rounding of the largest are no part of the product.
            end = min(end, int(np.count_nonzero(s > s[0] * np.finfo(np.float32).eps / 16)))
            root = np.sqrt(s[rank:end])
            residual[layer.a] = (root[:, np.newaxis] * v[rank:end]).astype(np.float32)
            residual[layer.b] = (u[:, rank:end] * root).astype(np.float32)
            kept += float(np.square(s[rank:end]).sum())
            discarded += float(np.square(s[max(end, rank) :]).sum())
        return Aggregate(
            adapter=adapter,
            residual=residual if rank_of(residual) else {},
            figures={"residual_norm": math.sqrt(kept), "discarded_norm": math.sqrt(discarded)},
            memory=memory,
        )

    def _present(self, layer: Layer) -> Product:
        """What all sites started from: the adapter's product plus the residual's."""
        lefts = [_wide(self._adapter[layer.b]) * self._scale]
        rights = [_wide(self._adapter[layer.a])]
        if self._residual:
            lefts.append(_wide(self._residual[layer.b]))
            rights.append(_wide(self._residual[layer.a]))
        return lefts, rights

    def _mean(self, layer: Layer) -> Product:
        """The weighted mean of the sites' products plus the present residual."""
        total = sum(weight for _, weight in self._updates.values())
        lefts: list[Matrix] = []
        rights: list[Matrix] = []
        for _, (delta, weight) in sorted(self._updates.items()):
            rank = delta[layer.a].shape[0]
            a, b = _wide(self._adapter[layer.a]), _wide(self._adapter[layer.b])
            a[:rank] += delta[layer.a]
            b[:, :rank] += delta[layer.b]
            lefts.append(b * (self._scale * weight / total))
            rights.append(a)
        if self._residual:
            lefts.append(_wide(self._residual[layer.b]))
            rights.append(_wide(self._residual[layer.a]))
        return lefts, rights


def _wide(value: FloatArray) -> Matrix:
    """A float64 copy."""
    return value.astype(np.float64)
