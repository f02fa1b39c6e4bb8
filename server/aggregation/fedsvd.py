"""FedSVD: FFA, and after each round A and B made anew from the SVD of their product.

Lee et al., arXiv 2505.12805: B <- U S, A <- V, so that A's rows point where B A is largest and
are orthonormal. The product stays what it was; A never leaves the space of its first rows.
"""

from __future__ import annotations

import numpy as np

from fedqlora.adapter import Adapter, rank_of
from server.aggregation.aggregate import Aggregate
from server.aggregation.factors import decompose, pad_rank, pair_layers
from server.aggregation.ffa import Ffa


class FedSvd(Ffa):
    """The mean of B, then A and B anew.

    Args:
        adapter: the round's starting point.

    Raises:
        UpdateError: a tensor of the adapter is not one of a pair of matrices.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter)
        self._layers = pair_layers(adapter)
        self._rank = rank_of(adapter)

    def finish(self) -> Aggregate:
        """A and B whose product is the mean product.

        Raises:
            UpdateError: nothing was folded in.
        """
        mean = super().finish().adapter
        adapter: Adapter = {}
        for layer in self._layers:
            left, right = mean[layer.b].astype(np.float64), mean[layer.a].astype(np.float64)
            u, s, v = decompose([left], [right])
            adapter[layer.a] = pad_rank(v, self._rank, axis=0)
            adapter[layer.b] = pad_rank(u * s, self._rank, axis=1)
        return Aggregate(adapter=adapter)
