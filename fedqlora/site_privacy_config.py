"""SitePrivacyConfig: what a run promises to each site as a whole, by noise at the coordinator."""

from __future__ import annotations

from pydantic import Field

from fedqlora.section import Section


class SitePrivacyConfig(Section):
    """Whether the finished adapter hides that a site took part at all (client-level DP).

    The coordinator clips and adds noise, so it is trusted with each update (docs/privacy.md).
    """

    epsilon: float | None = Field(default=None, gt=0)
    """The promise over all rounds; none: nothing is promised."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Probability with which the promise may fail; without it 1/(n ln n) for
    `federation.expected_sites`."""
    clip_norm: float = Field(default=1.0, gt=0, le=1e4)
    """Largest L2 norm of a site's update over all tensors; longer ones are cut to it."""
    clip_quantile: float | None = Field(default=None, ge=0, le=1)
    """Adaptive clipping (arXiv 1905.03871): `clip_norm` is where the first round starts, and moves
    until this share of the updates is shorter; the share is counted with noise."""
    clip_rate: float = Field(default=0.2, gt=0, le=1)
    """How fast it moves."""
    few_sites: bool = False
    """Go on with fewer than 30 sites, whose mean the noise drowns."""

    @property
    def enabled(self) -> bool:
        """Whether something is promised."""
        return self.epsilon is not None
