"""Codec: adapters and deltas <-> bytes, in the safetensors format.

An adapter's own values are always sent as `float32`. Only a delta may be rounded: the rounding
of a small change is small, that of the weight it changes is not.

| encoding | bytes a value | what is lost |
|---|---|---|
| `float32` | 4 | nothing |
| `bfloat16` | 2 | all but 8 significant bits, rounded to nearest, ties to even |
| `int8` | 1.03 | up to half a step of 1/127 of the largest value in a block of 64 |
| `nf4` | 0.53 | up to 0.152 of the largest value in a block of 64 |
| `topk` | about 3 per kept value | all but the largest values, which are rounded to `bfloat16` |

Guarantees of the last three: equal deltas give equal bytes; a receiver takes nothing but what
fits the spec that it asked for, and allocates no more than the spec holds, whatever the bytes
say.

Edge cases: no tensors is a valid delta; arrays of size zero keep their shape. A value that is
not finite stays so in `float32` and `bfloat16` (the receiver refuses it); the other encodings
refuse it at the sender, with any value beyond the largest of `bfloat16`, 3.39e38.
"""

from __future__ import annotations

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import int8, nf4, topk
from fedqlora.codec.bfloat16 import LARGEST, from_bfloat16, to_bfloat16
from fedqlora.config import CodecConfig
from fedqlora.errors import UpdateError

_Parts = dict[str, NDArray[np.generic]]

_SPEC = "spec"
"""The part that binds a delta without names to its names and shapes: their SHA-256."""


def encode(adapter: Adapter, encoding: str) -> pb.Tensors:
    """Pack an adapter, or a delta that keeps its names.

    Args:
        adapter: float32 arrays by name.
        encoding: `float32` or `bfloat16`.

    Raises:
        UpdateError: the encoding is another one.
    """
    if encoding == "float32":
        arrays: _Parts = {name: np.ascontiguousarray(value) for name, value in adapter.items()}
    elif encoding == "bfloat16":
        arrays = {name: to_bfloat16(value) for name, value in adapter.items()}
    else:
        raise UpdateError(f"encoding {encoding[:40]} is unknown; use float32 or bfloat16")
    return pb.Tensors(encoding=encoding, data=safetensors.numpy.save(arrays))


def decode(tensors: pb.Tensors) -> Adapter:
    """Unpack what `encode` packed into float32 arrays.

    Raises:
        UpdateError: the bytes are not safetensors of the declared encoding, or that is another.
    """
    arrays = _load(tensors)
    wanted = {"float32": np.float32, "bfloat16": np.uint16}.get(tensors.encoding)
    if wanted is None or any(value.dtype != wanted for value in arrays.values()):
        raise UpdateError(f"tensors are not in encoding {tensors.encoding[:40]}; send them again")
    if wanted is np.float32:
        return {name: value.view(np.float32) for name, value in arrays.items()}
    return {name: from_bfloat16(value.view(np.uint16)) for name, value in arrays.items()}


def encode_delta(delta: Adapter, codec: CodecConfig) -> pb.Tensors:
    """Pack a delta as the run asks.

    Args:
        delta: float32 arrays by name.
        codec: encoding and its settings.

    Raises:
        UpdateError: a value is not finite, or beyond what the encoding holds.
    """
    if codec.update in ("float32", "bfloat16"):
        return encode(delta, codec.update)
    spec = AdapterSpec.of(delta)
    for name, value in delta.items():
        # A NaN fails both comparisons.
        if not (value.min(initial=0) >= -LARGEST and value.max(initial=0) <= LARGEST):
            raise UpdateError(
                f"update tensor {name} holds a value that is not finite or too large to encode; "
                "lower training.learning_rate"
            )
    values = [delta[name].reshape(-1) for name, _ in spec.shapes]
    if codec.update == "int8":
        parts: _Parts = dict(int8.pack(values))
    elif codec.update == "nf4":
        parts = dict(nf4.pack(values))
    else:
        parts = dict(topk.pack(values, codec.topk_fraction))
    parts[_SPEC] = _digest(spec)
    return pb.Tensors(encoding=codec.update, data=safetensors.numpy.save(parts))


def decode_delta(tensors: pb.Tensors, spec: AdapterSpec) -> Adapter:
    """Unpack a delta into float32 arrays.

    Args:
        tensors: what `encode_delta` packed.
        spec: names and shapes that the sender was asked for. They are in the bytes of
            `float32` and `bfloat16`, where the caller checks them (`check_update`).

    Raises:
        UpdateError: the bytes do not parse, are of another spec, or hold a wrong count, a
            position outside the spec or a scale or value that is not finite.
    """
    if tensors.encoding not in ("int8", "nf4", "topk"):
        return decode(tensors)
    parts = _load(tensors)
    if not np.array_equal(parts.pop(_SPEC, np.empty(0)), _digest(spec)):
        raise UpdateError(
            f"an update in encoding {tensors.encoding} is not of the adapter that was sent; train "
            "that one"
        )
    sizes = [int(np.prod(shape)) for _, shape in spec.shapes]
    unpack = {"int8": int8.unpack, "nf4": nf4.unpack, "topk": topk.unpack}[tensors.encoding]
    values = unpack(parts, sizes)
    return {
        name: value.reshape(shape) for (name, shape), value in zip(spec.shapes, values, strict=True)
    }


def _load(tensors: pb.Tensors) -> _Parts:
    try:
        return dict(safetensors.numpy.load(tensors.data))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError):
        raise UpdateError("tensors do not parse as safetensors; send them again") from None


def _digest(spec: AdapterSpec) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(spec.digest()), dtype=np.uint8)
