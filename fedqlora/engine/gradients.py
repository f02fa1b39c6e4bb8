"""Gradients: the invariant that the loss reaches every layer with an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedqlora.errors import ModelError


def check_gradients(gradients: Mapping[str, Tensor | None]) -> None:
    """Refuse a model in which an adapter module is cut off from the loss.

    Called after the first backward pass. While B is zero A's gradient is zero as well, so what
    counts is each module's tensors together.

    Args:
        gradients: of every trainable tensor, by the adapter's names; None where there is none.

    Raises:
        ModelError: names the first tensor without a finite gradient, or the first module whose
            gradients are all zero.
    """
    sizes: dict[str, float] = {}
    for name, gradient in gradients.items():
        if gradient is None or not bool(gradient.isfinite().all()):
            raise ModelError(
                f"adapter tensor {name} gets no finite gradient; leave its layer out of "
                "lora.targets or compute in float32"
            )
        module = name.partition(".lora_")[0]
        sizes[module] = sizes.get(module, 0.0) + float(gradient.abs().max())
    for module, size in sizes.items():
        if size == 0:
            raise ModelError(
                f"the adapter on {module} gets only zero gradients; leave it out of lora.targets"
            )
