"""Orthogonal: rows of A that stay orthogonal to what earlier tasks read (O-LoRA, arXiv 2310.14152).

The paper adds |A_earlier A'|^2 to the loss; here A is projected after every step, so that it is
exactly zero, and a new task changes nothing for inputs that earlier tasks read. Where A does not
train (`ffa`) it stays as it started and there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedqlora.adapter import A_PART, Adapter
from fedqlora.continual import earlier_rows


class Orthogonal:
    """Projects each A that trains.

    Args:
        parameters: what trains, by name.
        frozen: what earlier tasks left, of scale 1.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], frozen: Adapter) -> None:
        self._bases: list[tuple[torch.nn.Parameter, Tensor]] = []
        for name, parameter in parameters.items():
            basis = earlier_rows(frozen, name) if A_PART in name else None
            if basis is not None:
                self._bases.append((parameter, torch.from_numpy(basis).to(parameter)))

    @torch.no_grad()
    def project(self) -> None:
        """Take out of A what lies in the earlier rows' space."""
        for parameter, basis in self._bases:
            parameter.sub_((parameter @ basis.T) @ basis)
