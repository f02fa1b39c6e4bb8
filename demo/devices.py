"""Devices: what kinds of machines the hospitals of a simulation have, from a TOML file.

[[device]]
name = "slow"
share = 0.2            # of the hospitals
steps = 0.5            # of the run's steps, which is what their policy allows
rank = 0.5             # of the run's LoRA rank, likewise: little memory
unreliability = 0.0    # of the rounds, in which they do not answer
"""

from __future__ import annotations

import random
from pathlib import Path

from pydantic import Field, field_validator

from fedqlora.config import read_toml, validate
from fedqlora.section import Section


class Device(Section):
    """One kind of machine."""

    name: str = Field(min_length=1)
    """What it is called in the simulation's output."""
    share: float = Field(gt=0, le=1)
    """Share of the hospitals that have it."""
    steps: float = Field(default=1.0, gt=0, le=1)
    """Share of the run's steps that its hospital's policy allows in a round."""
    rank: float = Field(default=1.0, gt=0, le=1)
    """Share of the run's rank that its hospital's policy allows; below 1 the run must allow
    `lora.mixed_ranks`."""
    unreliability: float = Field(default=0.0, ge=0, le=1)
    """Share of the rounds in which it does not answer."""


class Devices(Section):
    """All kinds; their shares add up to 1."""

    device: tuple[Device, ...] = Field(min_length=1)
    """The kinds of machines."""

    @field_validator("device")
    @classmethod
    def _shares_are_whole(cls, kinds: tuple[Device, ...]) -> tuple[Device, ...]:
        total = sum(kind.share for kind in kinds)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:g}, not to 1")
        return kinds


SAME = Devices(device=(Device(name="workstation", share=1.0),))
"""Every hospital has the machine that the run expects."""


def load_devices(path: Path) -> Devices:
    """Read a file of devices.

    Raises:
        ConfigError: it is missing or wrong.
    """
    return validate(Devices, read_toml(path), str(path))


def assign(devices: Devices, count: int, seed: int) -> list[Device]:
    """The machine of each hospital: the shares, rounded, in an order that the seed draws."""
    kinds: list[Device] = []
    upto = 0.0
    for kind in devices.device:
        upto += kind.share
        kinds += [kind] * (round(upto * count) - len(kinds))
    random.Random(f"devices:{seed}").shuffle(kinds)  # noqa: S311 - reproducible, no secret
    return kinds
