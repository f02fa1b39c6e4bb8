"""LoraConfig: the adapter that a run trains."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from fedqlora.section import Section


class LoraConfig(Section):
    """The trainable adapter (LoRA, arXiv 2106.09685), as PEFT defines it."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Columns of B and rows of A in every target layer."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha/rank, or alpha/sqrt(rank) with rslora."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of A while training."""
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """Names of the linear layers that get an adapter (suffix match). `auto`: those that suit the
    architecture, which are all but the output head in a transformer and fewer in state-space
    models and mixtures of experts (engine/architectures.py). `all-linear`: all but the head."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353)."""
    mixed_ranks: bool = False
    """Let a site whose policy allows a lower rank than `rank` train at that rank, instead of
    refusing."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at_rank(self, rank: int) -> LoraConfig:
        """The same adapter at another rank and with the same scale."""
        if rank == self.rank:
            return self
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return self.model_copy(update={"rank": rank, "alpha": alpha})
