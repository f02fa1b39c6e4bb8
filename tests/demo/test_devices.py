from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from client.policy import load_policy
from demo.devices import SAME, Device, Devices, assign, load_devices
from demo.hospitals import Hospitals
from demo.simulation import lay_out
from fedqlora.config import RunConfig, validate
from fedqlora.errors import ConfigError
from server.checkpoint import RunFolder

ROOT = Path(__file__).parents[2]
MIXED = ROOT / "experiments" / "devices" / "mixed.toml"


def test_shares_become_numbers_of_sites() -> None:
    kinds = assign(load_devices(MIXED), 20, seed=1)
    assert Counter(kind.name for kind in kinds) == {
        "workstation": 8,
        "slow": 4,
        "little memory": 4,
        "unreliable": 4,
    }


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


def test_a_machine_bounds_steps_and_rank_by_its_hospitals_policy(tmp_path: Path) -> None:
    config = validate(
        RunConfig,
        {
            "model": {"base": "tiny-llama"},
            "training": {"steps": 10, "fewer_steps": True},
            "lora": {"rank": 8, "mixed_ranks": True},
        },
        "test",
    )
    hospitals = Hospitals(config, 2, tmp_path, simulated=True)
    hospitals.prepare()
    weak = Device(name="weak", share=0.5, steps=0.04, rank=0.25)
    sites = lay_out(RunFolder.create(tmp_path, config), hospitals, [SAME.device[0], weak])
    limits = [load_policy(site.policy).limits for site in sites]
    assert [(limit.steps, limit.rank) for limit in limits] == [(10, 8), (1, 2)]
