"""Drift: what keeps a site's steps from carrying it away from the other sites.

FedProx (Li et al., arXiv 1812.06127): the gradient of mu/2 |w - w_start|^2 is added to each step's.
SCAFFOLD (Karimireddy et al., arXiv 1910.06378): all sites' mean gradient minus the site's own, both
of the last round, is added. A site's next control variate is the mean of its uncorrected gradients
over the round: with plain SGD that is the paper's option II, (start - end) / (steps * rate) minus
the correction, and with AdamW, whose steps are no gradients, it is still a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedqlora.adapter import Adapter, FloatArray


class Drift:
    """Corrects the gradients of one round.

    Args:
        parameters: what trains, by name, as it was sent.
        proximal: mu; 0 for no pull.
        correction: what is added to each gradient; None where the site keeps no control variate.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        proximal: float,
        correction: Mapping[str, FloatArray] | None,
    ) -> None:
        self._parameters = parameters
        self._proximal = proximal
        self._anchors = {}
        if proximal > 0:
            self._anchors = {name: p.detach().clone() for name, p in parameters.items()}
        self._corrections: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        if correction is not None:
            for name, parameter in parameters.items():
                self._corrections[name] = torch.tensor(correction[name]).to(parameter)
                self._sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
        self._steps = 0

    def correct(self) -> None:
        """Change the gradients that the parameters hold, after they were computed."""
        if not self._anchors and not self._corrections:
            return
        self._steps += 1
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None:
                raise RuntimeError(f"{name} has no gradient; correct after the backward pass")
            if name in self._corrections:
                self._sums[name] += gradient
                gradient += self._corrections[name]
            if name in self._anchors:
                gradient.add_(parameter.detach() - self._anchors[name], alpha=self._proximal)

    def mean_gradient(self) -> Adapter:
        """The mean of the uncorrected gradients; empty without a correction."""
        return {name: (total / self._steps).cpu().numpy() for name, total in self._sums.items()}
