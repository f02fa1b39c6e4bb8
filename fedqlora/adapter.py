"""Adapter: the trainable tensors by name, as float32 numpy arrays; arithmetic without torch.

Names are PEFT's own state-dict names (`base_model.model....lora_A.weight`), so a finished
adapter is written out without renaming. `lora_A` has shape (rank, d_in), `lora_B`
(d_out, rank); any other name (DoRA's magnitude vector) starts from values that depend on the
public base model only and comes from the sites' descriptions.
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


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Names and shapes of an adapter, in a fixed (sorted) order."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, adapter: Mapping[str, NDArray[np.generic]]) -> AdapterSpec:
        """The spec that an adapter has."""
        return cls(shapes=tuple(sorted((name, tuple(a.shape)) for name, a in adapter.items())))

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(int(np.prod(shape)) for _, shape in self.shapes)

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
        if ".lora_A." in name:
            bound = 1 / np.sqrt(shape[1])
            key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "big")
            uniform = np.random.Generator(np.random.PCG64(key)).random(shape, dtype=np.float32)
            adapter[name] = (2 * uniform - 1) * np.float32(bound)
        elif ".lora_B." in name:
            adapter[name] = np.zeros(shape, dtype=np.float32)
        elif name in given and given[name].shape == shape:
            adapter[name] = given[name]
        else:
            raise UpdateError(f"adapter tensor {name} has no start value; describe it with one")
    return adapter


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
