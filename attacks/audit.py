"""Audit: a lower bound of epsilon from one training run.

Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run" (arXiv 2305.08846). Of m
canaries each is trained on or not by the toss of a coin. From the update the auditor guesses the
tosses of some of them. Were the training (epsilon, delta) private, so many right guesses would be
too good; the largest epsilon that is refuted with the wanted confidence is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

CONFIDENCE = 0.999
"""With this probability a bound is right: of a sound mechanism, one audit in a thousand is not."""

_MOST = 64.0


def score_canaries(
    update: NDArray[np.float64], gradients: NDArray[np.float64], noise: float
) -> NDArray[np.float64]:
    """(m,) how much of each canary's gradient is in an update: the likeliest share, up to scale.

    The best linear estimate of coin tosses from update = scale (tosses . gradients + noise), the
    scale taken from how much of all canaries together is in it.

    Args:
        update: (D,) minus the delta of one plain gradient step.
        gradients: (m, D) what each canary adds to the step.
        noise: standard deviation of the noise in one place.
    """
    gram = gradients @ gradients.T
    half = gradients.sum(0) / 2
    scale = float(update @ half) / float(half @ half)
    rest = gradients @ (update / scale - half) if scale > 0 else gradients @ update
    shrink = 4 * noise**2 + 1e-9 * float(np.trace(gram)) / len(gram)
    scores: NDArray[np.float64] = np.linalg.solve(gram + shrink * np.eye(len(gram)), rest)
    return scores


def lower_bound(
    included: NDArray[np.bool_],
    scores: NDArray[np.float64],
    delta: float,
    confidence: float = CONFIDENCE,
    shares: Sequence[float] = (0.05, 0.2, 0.9),
) -> float:
    """The best lower bound of epsilon from guesses about the canaries of highest and lowest score.

    Args:
        included: (m,) the tosses.
        scores: (m,) higher means that the canary was more likely trained on.
        delta: the promise's delta.
        confidence: of the bound. Each share of guesses is held to its part of the error.
        shares: how many of the canaries are guessed at, fixed beforehand.
    """
    order = np.argsort(-scores)
    bounds = []
    for share in shares:
        half = max(1, round(len(order) * share / 2))
        right = int(included[order[:half]].sum() + (~included[order[-half:]]).sum())
        error = (1 - confidence) / len(shares)
        bounds.append(refuted_epsilon(len(order), 2 * half, right, delta, error))
    return max(bounds)


def refuted_epsilon(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest epsilon under which so many right guesses have at most the probability `error`.

    Args:
        canaries: m.
        guesses: about how many of them a guess was made.
        right: how many guesses were right.
        delta: the promise's delta.
        error: one minus the confidence.
    """
    low, high = 0.0, _MOST
    if right_guesses_probability(canaries, guesses, right, low, delta) > error:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        fits = right_guesses_probability(canaries, guesses, right, middle, delta) > error
        low, high = (low, middle) if fits else (middle, high)
    return low


def right_guesses_probability(
    canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Most probability of so many right guesses, or more, under (epsilon, delta): theorem 5.2."""
    chance = 1 / (1 + math.exp(-epsilon))
    pure = float(binom.sf(right - 1, guesses, chance))
    # What delta adds: for every i, the chance of up to i fewer right guesses, spread over i.
    fewer = np.cumsum(binom.pmf(right - np.arange(1, right + 1), guesses, chance))
    worst = float((fewer / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, pure + 2 * canaries * delta * worst)
