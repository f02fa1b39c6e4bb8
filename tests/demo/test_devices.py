from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from demo.devices import SAME, Device, Devices, assign, load_devices
from fedqlora.errors import ConfigError

ROOT = Path(__file__).parents[2]
MIXED = ROOT / "experiments" / "devices" / "mixed.toml"


def test_shares_become_numbers_of_sites() -> None:
    kinds = assign(load_devices(MIXED), 20, seed=1)
    assert Counter(kind.name for kind in kinds) == {"workstation": 10, "slow": 6, "unreliable": 4}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_every_site_has_a_machine_however_shares_are_rounded(count: int) -> None:
    thirds = Devices(device=tuple(Device(name=name, share=1 / 3) for name in "xyz"))
    assert len(assign(thirds, count, seed=1)) == count
    assert len(assign(SAME, count, seed=1)) == count


def test_the_seed_draws_who_has_which_machine() -> None:
    mixed = load_devices(MIXED)
    assert assign(mixed, 20, seed=1) == assign(mixed, 20, seed=1)
    assert assign(mixed, 20, seed=1) != assign(mixed, 20, seed=2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[[device]]\nname = "x"\nshare = 0.5\n', "the shares add up to 0.5, not to 1"),
        ('[[device]]\nname = "x"\nshare = 1.0\nsteps = 0.0\n', "device.0.steps is wrong"),
        ('[[device]]\nname = "x"\nshare = 1.0\nspeed = 2\n', "device.0.speed is not a known key"),
        ("", "device is missing"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_devices(path)
