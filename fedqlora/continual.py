"""Continual: the adapter that a further task starts from, without torch.

Notation: A (r x d_in) and B (d_out x r) are a layer's factors, s is their scale. What earlier tasks
have taught is s B A plus the residual's product; all of it is written as one adapter of scale 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import (
    A_PART,
    B_PART,
    INITIAL_ROW_NORM,
    Adapter,
    AdapterSpec,
    initial_adapter,
)
from fedqlora.errors import UpdateError

_INDEPENDENT = 1e-6
"""A direction counts if its singular value is so large a share of the largest (float32 factors)."""


def freeze(adapter: Adapter, residual: Adapter, scale: float) -> Adapter:
    """One adapter of scale 1 with the function of both; its rank is that of both together.

    Args:
        adapter: its product counts with `scale`.
        residual: its product counts with 1; empty for none.
        scale: s.
    """
    frozen: Adapter = {}
    for name, value in adapter.items():
        axis = 0 if A_PART in name else 1
        own = value if axis == 0 else value * np.float32(scale)
        frozen[name] = np.concatenate([own, residual[name]], axis=axis) if residual else own.copy()
    return frozen


def row_basis(a: NDArray[np.floating]) -> NDArray[np.float64]:
    """Orthonormal rows that span the rows of A; as many as are independent."""
    _, values, rows = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    kept = values > _INDEPENDENT * max(values[0], 1e-30)
    return np.asarray(rows[kept])


def earlier_rows(frozen: Adapter, name: str) -> NDArray[np.float64] | None:
    """Orthonormal rows of what earlier tasks read in one layer; None if they changed nothing there.

    Args:
        frozen: what earlier tasks left.
        name: of the layer's A.
    """
    if not np.any(frozen[name.replace(A_PART, B_PART)]):
        return None
    return row_basis(frozen[name])


def orthogonal_start(spec: AdapterSpec, seed: int, frozen: Adapter) -> Adapter:
    """A first adapter whose rows of A are orthogonal to those of what is frozen; B is zero.

    Args:
        spec: names and shapes.
        seed: the run's seed.
        frozen: what earlier tasks left, from `freeze`.

    Raises:
        UpdateError: a layer has fewer input directions left than the rank.
    """
    adapter = initial_adapter(spec, seed, {})
    for name, value in adapter.items():
        if A_PART not in name:
            continue
        rank, width = value.shape
        basis = earlier_rows(frozen, name)
        if basis is None:
            continue
        if len(basis) + rank > width:
            raise UpdateError(
                f"earlier tasks take {len(basis)} of the {width} input directions of {name}, "
                f"which leaves less than the rank {rank}; set continual.orthogonal = false"
            )
        free = value - value.astype(np.float64) @ basis.T @ basis
        free *= INITIAL_ROW_NORM / np.linalg.norm(free, axis=1, keepdims=True)
        adapter[name] = free.astype(np.float32)
    return adapter
