"""UnitGradients: per-unit gradients of a LoRA adapter, formed while autograd runs backward.

Each `lora_A` and `lora_B` is a plain linear layer y = x W'. Its gradient for row b is g_b' x_b:
one batched product instead of the single one that autograd would do, so it costs the same. No
per-row copy of anything but the adapter's own (small) gradients is made.

Shape letters: R rows, L tokens of a row, U units, i and o a layer's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fedqlora.errors import PrivacyError


class UnitGradients:
    """Inside the context, backward passes add to `values` and to no parameter's `.grad`.

    Args:
        parameters: the trainable parameters by the adapter's names.
        model: the PEFT model that holds them.
        units: U, how many units the rows belong to.

    Attributes:
        values: (U, *shape) float32 by name; complete after the last backward pass.

    Raises:
        PrivacyError: a trainable tensor is not the only use of a LoRA linear layer's weight
            (DoRA's magnitude, a weight shared by two layers, a convolution).
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], model: torch.nn.Module, units: int
    ) -> None:
        self._layers = _find_layers(parameters, model)
        self._owners = torch.zeros(0)
        self.values = {
            name: torch.zeros((units, *p.shape), device=p.device) for name, p in parameters.items()
        }

    def expect(self, owners: Tensor) -> None:
        """Say whose rows the next forward pass carries: (R,) unit numbers, int64."""
        self._owners = owners

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            layer.forward = self._make_forward(name, layer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer in self._layers.values():
            # What was set on the instance hid the class's own.
            del layer.forward

    def _make_forward(self, name: str, layer: torch.nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            if x.ndim < 3 or x.shape[0] != len(self._owners):
                raise PrivacyError(
                    f"layer {name.partition('.lora_')[0]} does not see the examples of a batch "
                    "apart (a mixture of experts does not), so one patient's share cannot be "
                    "bounded; leave it out of lora.targets"
                )
            y: Tensor = _Linear.apply(x, layer.weight, name, self)  # type: ignore[no-untyped-call]
            return y

        return forward

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add a layer's share: x (R, ..., i), output gradient (R, ..., o)."""
        rows = torch.bmm(gradient.flatten(1, -2).transpose(1, 2), x.flatten(1, -2))
        self.values[name].index_add_(0, self._owners.to(rows.device), rows.float())


class _Linear(torch.autograd.Function):
    """y = x W' whose backward hands W's per-row gradient over and leaves W's own out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, owner: UnitGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.owner = name, owner
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        # Under autocast the product was made in the output's type.
        ctx.owner.add(ctx.name, x.to(gradient.dtype), gradient)
        into = None
        if ctx.needs_input_grad[0]:
            into = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        return into, None, None, None


def _find_layers(
    parameters: Mapping[str, torch.nn.Parameter], model: torch.nn.Module
) -> dict[str, torch.nn.Module]:
    """The linear layer of each trainable tensor, by the tensor's name."""
    uses: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for own in module.parameters(recurse=False):
            uses.setdefault(id(own), []).append(module)
    layers: dict[str, torch.nn.Module] = {}
    for name, parameter in parameters.items():
        users = uses[id(parameter)]
        if len(users) > 1:
            raise PrivacyError(
                f"adapter tensor {name} is shared by {len(users)} layers, so per-patient "
                "gradients are not supported; leave one of them out of lora.targets"
            )
        if type(users[0]) is not torch.nn.Linear or users[0].bias is not None:
            raise PrivacyError(
                f"adapter tensor {name} is not the weight of a plain LoRA layer, so per-patient "
                "gradients are not supported; set lora.dora = false and target linear layers"
            )
        layers[name] = users[0]
    return layers
