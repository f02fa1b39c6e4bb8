"""Placement: which GPU of a site holds which layers of a base model that one GPU cannot hold.

Layers are computed one GPU after the other (accelerate's hooks move what passes between them), so
several GPUs give room and no speed. Nothing is put on the CPU or a disk: 4-bit layers cannot be,
and backward fails through others. A base that does not fit is refused before it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import CustomDtype, compute_module_sizes
from transformers.pytorch_utils import Conv1D

from fedqlora.errors import ModelError

ROOM = 0.8
"""Share of a GPU's memory for weights; the rest is for activations and the adapter's optimizer."""
_GIB = 2**30


def place(
    auto: Any,
    config: Any,
    memory: Mapping[int, int],
    *,
    dtype: torch.dtype,
    quantized: bool,
    unquantized: tuple[str, ...],
) -> dict[str, int]:
    """Module -> number of its GPU, in the model's order, as even as whole blocks allow.

    Args:
        auto: the transformers class that makes the model.
        config: its configuration; no weight is read.
        memory: bytes that are free, by the GPU's number.
        dtype: of what is not in 4 bits.
        quantized: whether linear layers are in 4 bits.
        unquantized: names of modules that stay out of 4 bits; none: the output head.

    Raises:
        ModelError: it does not fit; says what it needs and names the first module without a place.
    """
    with init_empty_weights():
        model = auto.from_config(config)
    model.tie_weights()
    sizes_of = {"dtype": dtype, "special_dtypes": {}}
    if quantized:
        plain = _names_outside_4_bits(model, unquantized)
        sizes_of = {"dtype": CustomDtype.INT4, "special_dtypes": dict.fromkeys(plain, dtype)}
    sizes = compute_module_sizes(model, **sizes_of)
    blocks = set(model._no_split_modules or ())
    largest = max(
        (sizes[name] for name, m in model.named_modules() if type(m).__name__ in blocks), default=0
    )
    room = {gpu: int(free * ROOM) for gpu, free in memory.items()}
    last = max(room)
    even = {
        gpu: free if gpu == last else min(free, sizes[""] * free // sum(room.values()) + largest)
        for gpu, free in room.items()
    }
    placed: dict[str, int] = infer_auto_device_map(
        model, max_memory=even, no_split_module_classes=list(blocks), **sizes_of
    )
    for name, where in placed.items():
        if not isinstance(where, int):
            raise ModelError(
                f"the base model needs {sizes[''] / _GIB:.1f} GiB for its weights and its GPUs "
                f"have {sum(room.values()) / _GIB:.1f} GiB for them, so {name or 'it'} finds no "
                "place; give this process more GPUs, or choose 4 bits or a smaller base"
            )
    return placed


def _names_outside_4_bits(model: Any, unquantized: tuple[str, ...]) -> list[str]:
    """Parameters that keep their dtype: all but the matrices of linear layers."""
    head = model.get_output_embeddings()
    codes = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and name.rpartition(".")[2] not in unquantized
    }
    return [name for name, _ in model.named_parameters() if name not in codes]
