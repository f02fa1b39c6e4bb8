"""Geometry: norms and inner products of updates, as factors or as the products they make.

(B R, R^-1 A) is the same product for every invertible R: a site can move its factors as far as it
likes and change nothing, or little and change much. Where the product is what a method averages,
it is the change of the product, s (B_i A_i - B A), whose length and angles count. Written as
[dB_i, B] [A_i; dA_i] it needs no d_out x d_in matrix, and nothing cancels when it is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedqlora.adapter import A_PART, B_PART, Adapter, FloatArray, norm
from server.aggregation.factors import Matrix

_CHUNK = 2**18


def measure_norms(adapter: Adapter, delta: Adapter, scale: float) -> dict[str, float]:
    """The norms of one update, over all layers.

    Args:
        adapter: the round's starting point.
        delta: what trained of it; of a lower rank it is its first rows of A and columns of B.
        scale: what B A is multiplied by.

    Returns:
        `a_norm` and `b_norm` of the tensors of A and B, where some trained; `product_norm` of the
        change of the products, where there is a product; `update_norm` of all tensors.
    """
    found: dict[str, float] = {}
    for name, part in (("a_norm", A_PART), ("b_norm", B_PART)):
        tensors = {key: value for key, value in delta.items() if part in key}
        if tensors:
            found[name] = norm(tensors)
    if product_names(adapter):
        found["product_norm"] = math.sqrt(product_gram(adapter, [delta], scale)[0, 0])
    found["update_norm"] = norm(delta)
    return found


def product_names(adapter: Adapter) -> list[tuple[str, str]]:
    """Names of A and B of each layer in which both are matrices."""
    pairs = [(name, name.replace(A_PART, B_PART)) for name in adapter if A_PART in name]
    return [
        (a, b) for a, b in pairs if b in adapter and adapter[a].ndim == 2 and adapter[b].ndim == 2
    ]


def product_gram(adapter: Adapter, deltas: Sequence[Adapter], scale: float) -> Matrix:
    """Inner products (n, n) of the changes that n updates make to the products.

    <L_i R_i, L_j R_j> = trace((L_i' L_j) (R_j R_i')), which is the sum over L_i' L_j times
    R_i R_j', value by value: O((d_out + d_in) (n r)^2).

    Args:
        adapter: the round's starting point.
        deltas: the updates, their ranks may differ.
        scale: what B A is multiplied by.
    """
    gram = np.zeros((len(deltas), len(deltas)))
    for a, b in product_names(adapter):
        changes = [_change(adapter[a], adapter[b], delta.get(a), delta.get(b)) for delta in deltas]
        left = np.concatenate([part for part, _ in changes], axis=1)
        right = np.concatenate([part for _, part in changes], axis=0)
        starts = np.cumsum([0, *(part.shape[1] for part, _ in changes)])[:-1]
        table = (left.T @ left) * (right @ right.T)
        gram += np.add.reduceat(np.add.reduceat(table, starts, axis=0), starts, axis=1)
    return scale**2 * gram


def factor_gram(deltas: Sequence[Adapter]) -> Matrix:
    """Inner products (n, n) of n updates as one long vector each, in float64."""
    gram = np.zeros((len(deltas), len(deltas)))
    for name in deltas[0]:
        flat = [delta[name].reshape(-1) for delta in deltas]
        for start in range(0, flat[0].size, _CHUNK):
            part = np.stack([one[start : start + _CHUNK] for one in flat]).astype(np.float64)
            gram += part @ part.T
    return gram


def squared_distances(gram: Matrix) -> Matrix:
    """Squared distances (n, n) of vectors with these inner products."""
    squares = np.diagonal(gram)
    # Rounding may leave a tiny negative number between equal vectors.
    distances: Matrix = np.maximum(squares[:, np.newaxis] + squares - 2 * gram, 0.0)
    return distances


def _change(
    a: FloatArray, b: FloatArray, da: FloatArray | None, db: FloatArray | None
) -> tuple[Matrix, Matrix]:
    """Factors [dB, B] and [A + dA; dA] of the change of B A; what did not train has no part."""
    lefts: list[Matrix] = []
    rights: list[Matrix] = []
    wide = a.astype(np.float64)
    if da is not None:
        wide[: da.shape[0]] += da
        lefts.append(b[:, : da.shape[0]].astype(np.float64))
        rights.append(da.astype(np.float64))
    if db is not None:
        lefts.append(db.astype(np.float64))
        rights.append(wide[: db.shape[1]])
    return np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0)
