"""Peers: the coordinator's signature on a roster is not enough to be one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from certs.files import read_signing_key
from certs.fingerprint import name_signing
from certs.roster import read_roster as read_centre
from certs.roster import write_roster
from certs.site import make_all
from client.peers import choose_peers, load_peers, name_key, read_roster
from client.policy import Models, Policy, load_policy
from fedqlora.errors import ConfigError

ROOT = Path(__file__).parents[2]
MODELS = Models(digests=("d" * 64,))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The coordinator's folder of sites a, b and c; a trainer's folder has the same roster."""
    make_all(tmp_path / "out", ["a", "b", "c"])
    folder = tmp_path / "out" / "coordinator"
    public = tmp_path / "out" / "evaluator" / "coordinator.pub"
    (folder / "coordinator.pub").write_bytes(public.read_bytes())
    return folder


def pin(keys: Path, *sites: str) -> Policy:
    """A policy that pins these sites' present keys."""
    roster = read_roster(keys)
    return Policy(models=MODELS, peers={site: name_key(roster[site]) for site in sites})


def replace_key(keys: Path, site: str) -> None:
    """What a malicious coordinator can do: sign a roster with a key of its own for a site."""
    signer = read_signing_key(keys / "signing.key")
    roster = read_centre(keys, signer.public_key())
    forged = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    sites = {**roster.sites, site: replace(roster.sites[site], signing=forged)}
    write_roster(keys, replace(roster, sites=sites), signer)


def test_both_sides_print_the_same_fingerprint(keys: Path) -> None:
    roster = read_centre(keys, read_signing_key(keys / "signing.key").public_key())
    for site, key in read_roster(keys).items():
        assert name_key(key) == name_signing(roster.sites[site].signing)


def test_a_site_that_the_policy_does_not_pin_is_no_peer(keys: Path) -> None:
    assert set(read_roster(keys)) == {"a", "b", "c"}
    assert set(load_peers(pin(keys, "a", "b"), keys, "a")) == {"b"}
    assert load_peers(Policy(models=MODELS), keys, "a") == {}


def test_another_key_for_a_pinned_site_is_refused_although_the_coordinator_signed_it(
    keys: Path,
) -> None:
    policy = pin(keys, "b")
    replace_key(keys, "b")
    # Without the pin the forged key counts: its signature is good.
    forged = Policy(models=MODELS, peers={"b": name_key(read_roster(keys)["b"])})
    assert set(load_peers(forged, keys, "a")) == {"b"}
    with pytest.raises(ConfigError, match=r"peers\.b"):
        load_peers(policy, keys, "a")


def test_a_pinned_site_that_the_roster_lacks_is_no_peer(keys: Path) -> None:
    policy, roster = pin(keys, "b", "c"), read_roster(keys)
    del roster["c"]
    assert choose_peers(policy, roster, "a") == {"b": roster["b"]}


@pytest.mark.parametrize("damage", ["roster.json", "roster.sig", "coordinator.pub"])
def test_a_roster_that_the_coordinator_did_not_sign_is_refused(keys: Path, damage: str) -> None:
    policy = pin(keys, "b")
    content = (keys / damage).read_bytes()
    (keys / damage).write_bytes(content.replace(content[30:34], b"ffff", 1))
    with pytest.raises(ConfigError, match="coordinator"):
        load_peers(policy, keys, "a")


def test_pins_without_a_roster_are_refused_and_no_pins_need_none(keys: Path) -> None:
    policy = pin(keys, "b")
    (keys / "roster.json").unlink()
    with pytest.raises(ConfigError, match="pins peers"):
        load_peers(policy, keys, "a")
    assert load_peers(Policy(models=MODELS), keys, "a") == {}


def test_a_fingerprint_that_nobody_prints_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    start = f'[models]\ndigests = ["{"d" * 64}"]\n[peers]\n'
    path.write_text(start + 'b = "MZXW-6YTB-OI7E-3QKZ-2LPA-7NHD"\n')
    assert dict(load_policy(path).peers) == {"b": "MZXW-6YTB-OI7E-3QKZ-2LPA-7NHD"}
    for wrong in ("", "MZXW-6YTB", "mzxw-6ytb-oi7e-3qkz-2lpa-7nhd"):
        path.write_text(f'{start}b = "{wrong}"\n')
        with pytest.raises(ConfigError, match=r"peers\.b"):
            load_policy(path)


def test_the_trainer_does_not_start_with_another_key_for_a_pinned_peer(
    keys: Path, tmp_path: Path
) -> None:
    peers = pin(keys, "b").peers
    replace_key(keys, "b")
    lines = ["[models]", f'digests = ["{"d" * 64}"]', "[peers]", f'b = "{peers["b"]}"']
    (tmp_path / "policy.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "client.trainer", "--site", "a", "--device", "cpu"]
    for name in ("data", "models", "state"):
        command += [f"--{name}", str(tmp_path / name)]
    command += ["--policy", str(tmp_path / "policy.toml"), "--keys", str(keys)]
    command += ["--socket", str(tmp_path / "trainer.sock")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "(peers.b)" in done.stderr
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "trainer.sock").exists()
