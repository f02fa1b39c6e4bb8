"""Penalty: lambda |W - W0|^2 of the products, without ever forming a layer's d_out x d_in matrix.

W = s B A + R is what adapter and residual add to a layer's weights, W0 what they added when the
task began. With U = [R_B, -W0_B] (d_out x k) and V = [R_A; W0_A] (k x d_in), W - W0 is s B A + U V
and

    |W - W0|^2 = s^2 tr(B'B AA') + 2 s tr(B'U VA') + tr(U'U VV')

so everything is made of r x r, r x k and k x k matrices: O((d_in + d_out) (r + k)^2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedqlora.adapter import A_PART, B_PART, Adapter


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What a round's steps are held to."""

    weight: float
    """lambda."""
    scale: float
    """s, of the adapter that trains."""
    anchor: Adapter
    """W0, as an adapter of scale 1."""


@dataclass(frozen=True)
class _Layer:
    """One layer's factors: the adapter's, which change, and the fixed ones."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    u: Tensor
    v: Tensor


class ProductPenalty:
    """The penalty's value and gradient at the adapter's present values.

    Args:
        penalty: weight, scale and W0.
        tensors: all of the adapter's parameters by name.
        residual: what lies frozen beside it with scale 1; empty for nothing.
    """

    def __init__(
        self, penalty: Penalty, tensors: Mapping[str, torch.nn.Parameter], residual: Adapter
    ) -> None:
        self._weight = penalty.weight
        self._scale = penalty.scale
        self._layers = []
        for name, a in tensors.items():
            if A_PART not in name:
                continue
            other = name.replace(A_PART, B_PART)
            left, right = [-penalty.anchor[other]], [penalty.anchor[name]]
            if residual:
                left.append(residual[other])
                right.append(residual[name])
            b = tensors[other]
            self._layers.append(
                _Layer(
                    a,
                    b,
                    torch.from_numpy(np.concatenate(left, axis=1)).to(b),
                    torch.from_numpy(np.concatenate(right, axis=0)).to(a),
                )
            )

    @torch.no_grad()
    def value(self) -> float:
        """The term lambda |W - W0|^2 over all layers."""
        s = self._scale
        total = 0.0
        for x in self._layers:
            own = s * s * torch.sum((x.b.T @ x.b) * (x.a @ x.a.T))
            cross = 2 * s * torch.sum((x.b.T @ x.u) * (x.a @ x.v.T))
            total += float(own + cross + torch.sum((x.u.T @ x.u) * (x.v @ x.v.T)))
        return self._weight * total

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to that of every parameter that trains."""
        s = self._scale
        for x in self._layers:
            if x.b.grad is not None:
                slope = s * x.b @ (x.a @ x.a.T) + x.u @ (x.v @ x.a.T)
                x.b.grad.add_(slope, alpha=2 * self._weight * s)
            if x.a.grad is not None:
                slope = s * (x.b.T @ x.b) @ x.a + (x.b.T @ x.u) @ x.v
                x.a.grad.add_(slope, alpha=2 * self._weight * s)
