"""ServerOptimizerConfig: how far, and with what momentum, a round's mean moves the adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedqlora.section import Section


class ServerOptimizerConfig(Section):
    """What the centre makes of the mean of a round's updates."""

    name: Literal["none", "momentum", "adam", "yogi"] = "none"
    """`none`: the mean is the next adapter. `momentum`: FedAvgM (arXiv 1909.06335), with
    `exact_svd` on the products. `adam`, `yogi`: FedAdam and FedYogi (arXiv 2003.00295), on A
    and B."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Factor of a round's step; without it 1 for `momentum`, and 0.01 for `adam` and `yogi`, whose
    steps are about so long in every value."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the earlier rounds' movement in this one's (beta 1)."""
    second_moment: float = Field(default=0.99, ge=0, lt=1)
    """The same for the squares that `adam` and `yogi` divide by (beta 2)."""
    tau: float = Field(default=1e-3, gt=0)
    """Added to the root of those squares: the larger, the less `adam` and `yogi` adapt."""

    @property
    def rate(self) -> float:
        """The factor of a round's step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name == "momentum" else 0.01
