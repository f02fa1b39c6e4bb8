"""Adapter: the trainable tensors by name, as float32 numpy arrays; arithmetic without torch.

Names are PEFT's own state-dict names (`base_model.model....lora_A.weight`), so a finished
adapter is written out without renaming. `lora_A` has shape (rank, d_in), `lora_B`
(d_out, rank); any other name (DoRA's magnitude vector) starts from values that depend on the
public base model only and comes from the sites' descriptions.

A residual is a second adapter on the same layers, never trained, whose product counts with
scale 1; an empty one means that there is none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedqlora.errors import UpdateError

FloatArray = NDArray[np.float32]
Adapter = dict[str, FloatArray]

A_PART, B_PART = ".lora_A.", ".lora_B."

INITIAL_ROW_NORM = 1 / math.sqrt(3)
"""Root mean square norm of a row of A at its start: d_in values of variance 1/(3 d_in)."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Names and shapes of an adapter, in a fixed (sorted) order."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, adapter: Mapping[str, NDArray[np.generic]]) -> AdapterSpec:
        """The spec that an adapter has."""
        return cls(shapes=tuple(sorted((name, tuple(a.shape)) for name, a in adapter.items())))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(name for name, _ in self.shapes)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(int(np.prod(shape)) for _, shape in self.shapes)

    def at_rank(self, rank: int) -> AdapterSpec:
        """The same adapter with another rank of all A and B."""
        return AdapterSpec(
            shapes=tuple((name, _shape_at(rank, name, shape)) for name, shape in self.shapes)
        )

    def digest(self) -> str:
        """SHA-256 over names and shapes, as hex."""
        return hashlib.sha256(repr(self.shapes).encode()).hexdigest()


def initial_adapter(spec: AdapterSpec, seed: int, given: Mapping[str, FloatArray]) -> Adapter:
    """The adapter before the first round, the same on every machine.

    A is uniform in ±1/sqrt(d_in) (PEFT's default, Kaiming uniform with a = sqrt 5), B is
    zero, so the tuned model starts as the base model. Each tensor has a generator of its
    own, seeded by the run's seed and its name: adding a layer does not change the others.

    Args:
        spec: names and shapes, from the sites' descriptions.
        seed: the run's seed.
        given: starting values of tensors that are neither A nor B.

    Raises:
        UpdateError: a tensor is neither A nor B and has no given value.
    """
    adapter: Adapter = {}
    for name, shape in spec.shapes:
        if A_PART in name:
            bound = 1 / np.sqrt(shape[1])
            key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "big")
            uniform = np.random.Generator(np.random.PCG64(key)).random(shape, dtype=np.float32)
            adapter[name] = (2 * uniform - 1) * np.float32(bound)
        elif B_PART in name:
            adapter[name] = np.zeros(shape, dtype=np.float32)
        elif name in given and given[name].shape == shape:
            adapter[name] = given[name]
        else:
            raise UpdateError(f"adapter tensor {name} has no start value; describe it with one")
    return adapter


def _shape_at(rank: int, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape with another rank."""
    if A_PART in name:
        return (rank, *shape[1:])
    if B_PART in name:
        return (shape[0], rank, *shape[2:])
    return shape


def rank_of(adapter: Mapping[str, FloatArray]) -> int:
    """The largest rank of an adapter's layers, by the shapes of A and B; 0 if it has none."""
    ranks = [v.shape[0] for name, v in adapter.items() if A_PART in name and v.ndim > 0]
    ranks += [v.shape[1] for name, v in adapter.items() if B_PART in name and v.ndim > 1]
    return max(ranks, default=0)


def check_rank(rank: int, most: int) -> None:
    """Refuse a rank outside 1 to `most`.

    Raises:
        UpdateError: says both.
    """
    if not 1 <= rank <= most:
        raise UpdateError(f"update has rank {rank}; train at a rank from 1 to {most}")


def add(adapter: Mapping[str, FloatArray], delta: Mapping[str, FloatArray]) -> Adapter:
    """Adapter + delta, tensor by tensor."""
    return {name: value + delta[name] for name, value in adapter.items()}


def subtract(after: Mapping[str, FloatArray], before: Mapping[str, FloatArray]) -> Adapter:
    """After - before: the delta that a round's training made."""
    return {name: value - before[name] for name, value in after.items()}


def norm(delta: Mapping[str, FloatArray]) -> float:
    """L2 norm over all tensors, accumulated in float64."""
    parts = (part for value in delta.values() for part in chunks(value))
    return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))


_T = TypeVar("_T", bound=np.generic)


def chunks(array: NDArray[_T]) -> Iterator[NDArray[_T]]:
    """Flat views of at most 2**16 values, so that float64 steps need no float64 copy."""
    flat = array.reshape(-1)
    return (flat[start : start + 2**16] for start in range(0, flat.size, 2**16))


def check_update(delta: Mapping[str, FloatArray], spec: AdapterSpec, max_norm: float) -> None:
    """Refuse an update that cannot be folded in.

    Guarantees: names and shapes equal the spec's, every value is finite, the L2 norm is at
    most `max_norm`. An adapter with no tensors passes only an empty spec.

    Raises:
        UpdateError: names the first tensor that is wrong and how.
    """
    expected = dict(spec.shapes)
    for name in sorted(expected.keys() | delta.keys()):
        if name not in delta:
            raise UpdateError(f"update lacks tensor {name}; train the adapter that was sent")
        if name not in expected:
            raise UpdateError(f"update has an unknown tensor {name[:200]}; send the adapter's only")
        if delta[name].shape != expected[name]:
            raise UpdateError(
                f"update tensor {name} has shape {delta[name].shape}, not {expected[name]}"
            )
        if not np.isfinite(delta[name]).all():
            raise UpdateError(f"update tensor {name} holds a value that is not finite")
    size = norm(delta)
    if size > max_norm:
        raise UpdateError(
            f"update norm {size:.4g} is above aggregation.max_update_norm = {max_norm:g}"
        )


def check_residual(residual: Mapping[str, FloatArray], spec: AdapterSpec, max_rank: int) -> None:
    """Refuse a residual that cannot lie beside an adapter.

    Guarantees: empty, or an A and a B for each of the adapter's and no other tensor; within a
    layer one rank, at most `max_rank`, which may differ between layers; every value is finite.

    Args:
        residual: what was sent.
        spec: the adapter's names and shapes.
        max_rank: the largest rank that the run allows.

    Raises:
        UpdateError: names the first tensor that is wrong and how.
    """
    if not residual:
        return
    expected: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in spec.shapes:
        first = residual.get(name.replace(B_PART, A_PART))
        rank = first.shape[0] if first is not None and first.ndim else 0
        expected.append((name, _shape_at(rank, name, shape)))
    check_update(residual, AdapterSpec(shapes=tuple(expected)), math.inf)
    if rank_of(residual) > max_rank:
        raise UpdateError(
            f"the residual has rank {rank_of(residual)}, more than the {max_rank} that the run "
            "allows; send it compressed to that"
        )


def lower_rank(
    adapter: Adapter, residual: Adapter, rank: int, scale: float
) -> tuple[Adapter, Adapter]:
    """An adapter of a lower rank and a residual, whose sum is the function that both were.

    The first rows of A and columns of B stay: where the factors come from an SVD they are its
    best part of that rank. The others move into the residual.

    Args:
        adapter: of at least that rank.
        residual: what lies beside it with scale 1; empty for none.
        rank: of the lower adapter.
        scale: what the adapter's B A is multiplied by, before and after.
    """
    lower: Adapter = {}
    rest: Adapter = {}
    for name, value in adapter.items():
        axis = 0 if A_PART in name else 1
        first, others = np.split(value, [rank], axis=axis)
        lower[name] = np.ascontiguousarray(first)
        moved = others if axis == 0 else others * np.float32(scale)
        rest[name] = np.concatenate([moved, residual[name]], axis=axis) if residual else moved
    return lower, rest if rank_of(rest) else {}
