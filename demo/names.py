"""Names of the demo's hospitals: letters, so that they can be counted off."""

from __future__ import annotations

import string

from fedqlora.errors import ConfigError

LETTERS = len(string.ascii_lowercase)
"""Most hospitals that run as processes or containers of their own."""
MOST_SITES = 100
"""Most hospitals of a simulation."""


def site_names(count: int, most: int = LETTERS) -> list[str]:
    """a, b, ..., z, aa, ab, ...

    Raises:
        ConfigError: fewer than 1 or more than `most`.
    """
    if not 1 <= count <= most:
        raise ConfigError(
            f"SITES={count} is not between 1 and {most}; choose a number in that range"
        )
    letters = string.ascii_lowercase
    pairs = (first + second for first in letters for second in letters)
    return [*letters, *pairs][:count]
