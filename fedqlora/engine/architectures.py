"""Architectures: what an adapter goes on and what stays out of 4 bits, by transformers' model type.

`lora.targets = "auto"` takes the layers from here. A model type that is not listed is treated like
a plain transformer, and every model is put to the test: `lora.py` refuses what cannot carry an
adapter, `gradients.py` what the loss does not reach. tests/federation/test_families.py takes each
row through a federated round, in 4 bits and not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one model type is prepared."""

    targets: tuple[str, ...] = ()
    """Last names of the linear layers that get an adapter; none: all but the output head."""
    unquantized: tuple[str, ...] = ()
    """Names of modules that stay out of 4 bits; none: the output head and what is tied to it."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Values of the model's configuration that training needs otherwise than for inference."""


_TRANSFORMER = Architecture()
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The scan reads the weights of these layers itself and never calls them: an adapter would not be
# seen, and 4-bit codes are not a matrix (it crashes).
_MAMBA = Architecture(
    targets=("in_proj",), unquantized=("lm_head", "x_proj", "dt_proj", "out_proj")
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bart": _TRANSFORMER,
    "falcon_mamba": _MAMBA,
    "gpt2": _TRANSFORMER,
    "jamba": Architecture(
        targets=("in_proj", *_ATTENTION, "gate_proj", "up_proj", "down_proj"),
    ),
    "llama": _TRANSFORMER,
    "mamba": _MAMBA,
    # The fused kernel on a GPU reads out_proj's weights.
    "mamba2": Architecture(targets=("in_proj",), unquantized=("lm_head", "out_proj")),
    # Experts are one fused tensor: neither a linear layer nor in 4 bits.
    "mixtral": Architecture(targets=_ATTENTION),
    "qwen3_next": Architecture(targets=("in_proj_qkvz", "in_proj_ba", "out_proj", *_ATTENTION)),
    "recurrent_gemma": _TRANSFORMER,
    # For inference it divides some weights by powers of two in place, which would change the
    # frozen base and pass the adapter by; a guard against float16's range that nothing here needs.
    "rwkv": Architecture(settings={"rescale_every": 0}),
    "t5": _TRANSFORMER,
    # Its shared block has one weight for several depths: adapters there work, but several cannot be
    # merged into one weight, so that is left to a run that asks for it. For out_proj see mamba2.
    "zamba2": Architecture(targets=("in_proj", "linear"), unquantized=("lm_head", "out_proj")),
}


def architecture_of(model_type: str) -> Architecture:
    """How a model type is prepared; one that is not listed as a plain transformer."""
    return ARCHITECTURES.get(model_type, _TRANSFORMER)
