"""Names of the demo's hospitals: letters, so that they can be counted off."""

from __future__ import annotations

import string

from fedqlora.errors import ConfigError


def site_names(count: int) -> list[str]:
    """a, b, c, ...

    Raises:
        ConfigError: fewer than 1 or more than 26.
    """
    if not 1 <= count <= len(string.ascii_lowercase):
        raise ConfigError(f"SITES={count} is not between 1 and 26; choose a number in that range")
    return list(string.ascii_lowercase[:count])
