"""SitePrivacy: the mean of clipped updates with noise, so that no site's part can be told.

Client-level differential privacy: McMahan et al., arXiv 1710.06963; adaptive clipping by a noised
count: Andrew et al., arXiv 1905.03871 (Algorithm 1, full participation).

Guarantees, each restated by a test in tests/server/test_site_privacy.py:

- One site more or less changes the sum by at most the clip norm, whatever it sends, and the count
  of short updates, of which each counts from one half, by at most one half.
- Both together spend what one Gaussian mechanism of the run's noise multiplier does.
- What is divided by does not depend on who took part.

Edge cases: an update of length zero stays so; a site's second update of a round is refused.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from dataclasses import replace
from types import ModuleType

import numpy as np

from fedqlora.adapter import Adapter, AdapterSpec, chunks, norm
from fedqlora.config import RunConfig
from fedqlora.errors import ConfigError, UpdateError
from fedqlora.privacy.noise import SecureNoise
from server.aggregation.aggregate import Aggregate, Aggregator, check_first

log = logging.getLogger("server")

CLIP = "site_privacy/clip_norm"
"""Where the clip norm of the next round stands in the run's memory."""

FRACTION_BITS = 32


class SitePrivacy:
    """Clips updates as they arrive; memory does not grow with the number of sites.

    Args:
        aggregator: takes the noised mean.
        spec: names and shapes of what trained.
        config: the run; it promises something.
        round_: from 1.
        memory: what the round before left.
        noise: only a test gives it.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        spec: AdapterSpec,
        config: RunConfig,
        round_: int,
        memory: Adapter,
        noise: SecureNoise | None = None,
    ) -> None:
        self._aggregator = aggregator
        self._spec = spec
        self._config = config
        self._round = round_
        self._noise = noise or SecureNoise()
        self._multiplier = noise_multiplier(config)
        settings = config.site_privacy
        self._clip = float(memory[CLIP][0]) if CLIP in memory else settings.clip_norm
        self._sums = {name: np.zeros(shape, dtype=np.int64) for name, shape in spec.shapes}
        self._seen: set[str] = set()
        self._short = 0.0

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Clip one site's delta and fold it in; see Aggregator.

        Raises:
            UpdateError: it is the site's second one, or has another weight than one.
        """
        check_first(site, self._seen)
        if weight != 1:
            raise UpdateError(f"site {site}'s update has weight {weight}, and all count once here")
        length = norm(delta)
        factor = min(1.0, self._clip / length) if length > 0 else 1.0
        for name, total in self._sums.items():
            for sums, values in zip(chunks(total), chunks(delta[name]), strict=True):
                scaled = np.multiply(values, factor * 2.0**FRACTION_BITS, dtype=np.float64)
                # Towards zero: rounded to nearest, a long update could pass the bound.
                sums += np.trunc(scaled).astype(np.int64)
        self._short += (length <= self._clip) - 0.5
        self._seen.add(site)

    def finish(self) -> Aggregate:
        """What the method makes of the noised mean, and the next round's clip norm.

        Raises:
            UpdateError: no update was taken.
        """
        if not self._seen:
            raise UpdateError("no update was folded in; a round needs at least one")
        config, settings = self._config, self._config.site_privacy
        sites = config.federation.expected_sites or 1
        multiplier, count_noise = split_noise(self._multiplier, sites)
        if settings.clip_quantile is None:
            multiplier = self._multiplier
        mean: Adapter = {}
        for name, total in self._sums.items():
            value = np.empty(total.shape, dtype=np.float32)
            for part, sums in zip(chunks(value), chunks(total), strict=True):
                noise = self._noise.normal(sums.size) * (multiplier * self._clip)
                part[:] = (sums * 2.0**-FRACTION_BITS + noise) / sites
            mean[name] = value
        self._aggregator.add("all sites", mean, 1)
        result = self._aggregator.finish()
        # Of the longest mean that there can be, which is the clip norm.
        ratio = multiplier * math.sqrt(self._spec.parameters) / sites
        if ratio > 1:
            log.warning(
                "round %s: the noise of site_privacy is %.3g times as long as the longest mean of "
                "%s sites can be; more sites, fewer rounds or a larger epsilon make it shorter",
                self._round,
                ratio,
                sites,
            )
        figures = {
            **result.figures,
            "site_epsilon": spent_by(config, self._round),
            "site_noise_multiplier": self._multiplier,
            "site_noise_ratio": ratio,
            "site_clip_norm": self._clip,
        }
        if settings.clip_quantile is None:
            return replace(result, figures=figures)
        noise_of_count = float(self._noise.normal(1)[0]) * count_noise
        share = 0.5 + (self._short + noise_of_count) / sites
        moved = self._clip * math.exp(-settings.clip_rate * (share - settings.clip_quantile))
        # Longer updates are refused anyway.
        moved = min(moved, config.aggregation.max_update_norm)
        memory = {**result.memory, CLIP: np.array([moved], dtype=np.float32)}
        return replace(result, figures=figures, memory=memory)


def split_noise(multiplier: float, sites: int) -> tuple[float, float]:
    """How adaptive clipping divides a run's noise between the updates and the count.

    Args:
        multiplier: of the whole.
        sites: expected number.

    Returns:
        The updates' noise multiplier, and the standard deviation of the count's noise: a twentieth
        of the sites as in the paper, but so much at least that the updates' is 3.3 % more.
    """
    count_noise = max(sites / 20, 2 * multiplier)
    return (multiplier**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise


def noise_multiplier(config: RunConfig) -> float:
    """The noise multiplier that keeps a run's promise to its sites over all rounds.

    Raises:
        PrivacyError: no noise keeps it.
        ConfigError: the accountant's package is not installed.
    """
    return _calibrate(
        config.site_privacy.epsilon or math.inf, _delta(config), config.federation.rounds
    )


def spent_by(config: RunConfig, round_: int) -> float:
    """Epsilon of a run up to a round, all sites taking part in each."""
    accountant = _accountant()
    one = accountant.Spending(
        sampling_rate=1.0, noise_multiplier=noise_multiplier(config), steps=round_
    )
    return float(accountant.spent_epsilon([one], _delta(config)))


def _delta(config: RunConfig) -> float:
    given, sites = config.site_privacy.delta, config.federation.expected_sites or 1
    return given or float(_accountant().default_delta(max(sites, 3)))


@functools.cache
def _calibrate(epsilon: float, delta: float, rounds: int) -> float:
    return float(_accountant().calibrate_noise(epsilon, delta, 1.0, rounds))


def _accountant() -> ModuleType:
    """Imported when it is needed: loading it takes a second."""
    try:
        return importlib.import_module("fedqlora.privacy.accountant")
    except ImportError:
        raise ConfigError(
            "site_privacy needs dp-accounting, which is not installed here; install fedqlora with "
            "the extra `engine`"
        ) from None
