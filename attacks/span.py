"""The span test: which tokens' first-layer inputs lie in the span of an update's rows.

DAGER (Petrov et al. 2024, arXiv 2405.15586), here for LoRA: the gradient of A is a sum of outer
products with the layer's inputs x, so its rows are combinations of them. In a first layer x belongs
to one token of a public vocabulary, so each token can be tried. It works where a step has fewer
different tokens than A has rows, all layers with the same input together, and where the optimizer
takes a plain gradient step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedqlora.adapter import FloatArray
from fedqlora.engine.model import BaseModel

_FIRST = tuple(f".layers.0.self_attn.{name}.lora_A." for name in ("q_proj", "k_proj", "v_proj"))


def first_inputs(base: BaseModel) -> FloatArray:
    """(V, d) what the first attention layer of a Llama reads for each token, wherever it stands."""
    model: Any = base.model.get_base_model()
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight.float()
        inputs: FloatArray = model.model.layers[0].input_layernorm(embedded).cpu().numpy()
    return inputs


def first_rows(delta: Mapping[str, FloatArray]) -> FloatArray:
    """(R, d) the update's rows of A in the layers that read `first_inputs`."""
    return np.concatenate([v for n, v in sorted(delta.items()) if any(f in n for f in _FIRST)])


def distances(rows: FloatArray, inputs: FloatArray, noise: float = 1e-5) -> NDArray[np.float64]:
    """(V,) how far each input is from the span of the rows, of its own length: 0 inside, 1 across.

    Args:
        rows: (R, d) of an update, R below d.
        inputs: (V, d).
        noise: directions in which the rows reach less than this part of the longest count as
            rounding.
    """
    _, sizes, directions = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    basis = directions[sizes > noise * max(sizes[0], 1e-300)]
    lengths = np.linalg.norm(inputs, axis=1, keepdims=True)
    unit = inputs / np.where(lengths > 0, lengths, 1)
    inside = np.square(unit @ basis.T).sum(1)
    outside: NDArray[np.float64] = np.sqrt(np.clip(1 - inside, 0, 1))
    return outside


def recover_tokens(found: NDArray[np.float64], tolerance: float = 0.1) -> set[int]:
    """The tokens whose distance is below a tolerance: those that the attacker names."""
    return {int(token) for token in np.flatnonzero(found < tolerance)}
