"""What a command of the command line has to say, to a person and to a program."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The end of a command that was not refused."""

    lines: Sequence[str]
    content: Mapping[str, object]
    exit_code: int = 0
    proof: Sequence[str] | None = None
    """Sites that have to be able to connect afterwards; None if nothing changed that shows."""


AddCommand = Callable[[str, Callable[[argparse.Namespace], Outcome], str], argparse.ArgumentParser]
"""Adds a command by its name, what carries it out, and one line of help."""
