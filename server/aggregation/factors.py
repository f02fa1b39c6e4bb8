"""Factors: products of tall and flat matrices and their SVD, without ever forming a product.

The product of `left` (d_out, k) and `right` (k, d_in) is decomposed by a thin QR of each and
the SVD of a small core, all in float64: O((d_out + d_in) k^2) instead of O(d_out d_in^2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import A_PART, B_PART, FloatArray
from fedqlora.errors import UpdateError

Matrix = NDArray[np.float64]
Product = tuple[list[Matrix], list[Matrix]]
"""Matrices (d_out, k_i) and (k_i, d_in) of which the sum of all products is meant."""


@dataclass(frozen=True)
class Layer:
    """Names of one layer's A and B."""

    a: str
    b: str


def pair_layers(adapter: Mapping[str, FloatArray]) -> list[Layer]:
    """The layers of an adapter, in its order.

    Raises:
        UpdateError: a tensor is not one of a pair of matrices A and B.
    """
    layers = [
        Layer(name, name.replace(A_PART, B_PART))
        for name in adapter
        if A_PART in name and name.replace(A_PART, B_PART) in adapter
    ]
    paired = {name for layer in layers for name in (layer.a, layer.b)}
    for name, value in adapter.items():
        if name not in paired or value.ndim != 2:
            raise UpdateError(
                f"adapter tensor {name} is not one of a pair of matrices, so its product has no "
                'SVD; leave its layer out of lora.targets or set aggregation.method = "fedavg"'
            )
    return layers


def decompose(lefts: Sequence[Matrix], rights: Sequence[Matrix]) -> tuple[Matrix, Matrix, Matrix]:
    """SVD of the sum of lefts[i] @ rights[i].

    Args:
        lefts: matrices (d_out, k_i).
        rights: matrices (k_i, d_in).

    Returns:
        (U, S, V): orthonormal columns (d_out, m), singular values (m,) from the largest,
        orthonormal rows (m, d_in), with m the least of d_out, d_in and the sum of all k_i. Where
        a singular value is zero the columns and rows are orthonormal none the less.
    """
    left_basis, left_core = np.linalg.qr(np.concatenate(lefts, axis=1))
    right_basis, right_core = np.linalg.qr(np.concatenate(rights, axis=0).T)
    u, s, v = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left_basis @ u, s, v @ right_basis.T


def pad_rank(matrix: Matrix, rank: int, axis: int) -> FloatArray:
    """As float32, with zeros up to a rank: a layer narrower than the rank has no more."""
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - matrix.shape[axis])
    return np.pad(matrix, missing).astype(np.float32)
