"""Membership: was this text among those that the site trained on?

Watson et al. 2022, "On the importance of difficulty calibration" (arXiv 2111.08440): the score of a
text is how much its loss fell from a reference model that has not seen it, here the adapter that
the aggregator sent. Reported as Carlini et al. 2022 (arXiv 2112.03570) ask: also the share of
members that are found while few other texts are accused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALSE_ALARMS = 0.1
"""Share of other texts that may be accused. A hundredth of a few hundred texts is one or two, and
which ones these are is chance."""


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from others.

    Attributes:
        auc: probability that a member scores above another text; 0.5 is a coin.
        found: share of the members found with at most `FALSE_ALARMS` of the others accused.
        curve: (share of others accused, share of members found), from (0, 0) to (1, 1).
    """

    auc: float
    found: float
    curve: tuple[tuple[float, float], ...]


def separate(members: NDArray[np.float64], others: NDArray[np.float64]) -> Separation:
    """The separation of two sets of scores; a higher score is meant to say member.

    Args:
        members: score of each text that was trained on.
        others: score of each text that was not.
    """
    above = (members[:, None] > others).mean() + (members[:, None] == others).mean() / 2
    limits = np.unique(np.concatenate([members, others]))[::-1]
    accused = [0.0, *((others >= limit).mean() for limit in limits)]
    found = [0.0, *((members >= limit).mean() for limit in limits)]
    curve = tuple((float(a), float(b)) for a, b in zip(accused, found, strict=True))
    return Separation(float(above), max(b for a, b in curve if a <= FALSE_ALARMS), curve)
