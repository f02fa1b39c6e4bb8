"""AggregationConfig: how the sites' updates become one, and which of them are believed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedqlora.halves import Method
from fedqlora.section import Section

Rule = Literal[
    "mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "norm_clipping"
]


class AggregationConfig(Section):
    """How the sites' updates become one."""

    method: Method = "exact_svd"
    """`exact_svd`: the mean of the products B A, its best part of the run's rank trained on, the
    rest kept beside it (FlexLoRA 2402.11505 with a residual). `fedavg`: mean of A and mean of B
    (1602.05629, for LoRA 2305.05644). `ffa`: A stays as it started, mean of B (2403.12313).
    `fedsvd`: `ffa`, and A and B made anew from the SVD of B A after each round (2505.12805).
    `rolora`: B and A in alternate rounds (2409.02346). Numbers are of arXiv."""
    residual_rank: int | None = Field(default=None, ge=0, le=4096)
    """Largest rank of the frozen residual adapter that `exact_svd` keeps; 0 keeps none.
    Without it four times `lora.rank`."""
    weighting: Literal["examples", "tokens", "uniform"] = "examples"
    """A site's weight: training examples seen, completion tokens seen, or one. `median` and
    `trimmed_mean` give every site the same say."""
    max_update_norm: float = Field(default=100.0, gt=0)
    """An update whose L2 norm over all tensors exceeds this is refused."""
    max_norm_ratio: float = Field(default=10.0, ge=1)
    """From the second round an update is refused whose norm over all A, over all B or over all
    products B A exceeds the median of the updates used in earlier rounds so many times."""
    rule: Rule = "mean"
    """What the method's mean is taken over. `mean`: all updates. `median` and `trimmed_mean`: one
    update, made value by value (1803.01498). `geometric_median`: all, those far off with less
    weight (RFA, 1912.13445). `krum`: the one update with the nearest neighbours; `multi_krum`:
    the n - f - 2 with the nearest (1703.02757). `norm_clipping`: all, cut to the median norm of
    earlier rounds. All but `mean` and `norm_clipping` hold every update of a round in memory."""
    malicious_sites: int = Field(default=1, ge=1)
    """How many sites may lie (f) without harm: `krum` and `multi_krum` need `min_sites` of 2 f + 3;
    `trimmed_mean` leaves out the f largest and the f smallest of each value."""
    canary: float | None = Field(default=None, ge=0)
    """Largest increase of the held-out loss over that of the last promoted adapter, as a share of
    it (0.02: 2 %). A round that is worse is set back: the next starts where it did. Holds every
    update of a round in memory, and evaluates every round."""
    canary_trials: int = Field(default=4, ge=0)
    """When a round is set back, so many sites, those with the longest updates, are left out one at
    a time to find who made it worse. Each costs an evaluation."""
    exclude_after: int | None = Field(default=None, ge=1)
    """A site that was found so many times takes no further part in the run; without it none is
    excluded."""
