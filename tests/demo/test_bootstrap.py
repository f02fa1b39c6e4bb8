"""A development cluster's volumes: filled once, each party with its own, never replaced."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from certs.rollover import roll_over
from certs.rotation import rotate
from certs.site import make_all
from client.ledger import Ledger
from client.peers import load_peers
from client.policy import load_policy
from demo.model import NAME
from fedqlora.audit import AuditLog
from fedqlora.engine.base import base_digest
from fedqlora.keys import load_signing_key
from server.roster import load_roster

ROOT = Path(__file__).parents[2]
CENTRE = ("certs", "superlink", "coordinator", "evaluator", "root", "models", "held-out")
SITE = ("supernode", "trainer", "data", "policy", "state")


@pytest.fixture
def deal(tmp_path: Path) -> Path:
    """Empty volumes for three sites, and a base model that stands for the demo's."""
    return make_volumes(tmp_path / "deal")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same volumes after a first call; to be copied only."""
    folder = make_volumes(tmp_path_factory.mktemp("first"))
    succeed(folder, "a,b,c")
    return folder


@pytest.fixture
def dealt(first: Path, tmp_path: Path) -> Path:
    """Volumes of three sites that were dealt before."""
    return Path(shutil.copytree(first, tmp_path / "dealt", symlinks=True))


def make_volumes(folder: Path) -> Path:
    for name in CENTRE:
        (folder / name).mkdir(parents=True)
    add_sites(folder, "abc")
    model = folder / "models" / NAME
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return folder


def add_sites(deal: Path, names: str) -> None:
    for site in names:
        for name in SITE:
            (deal / "sites" / site / name).mkdir(parents=True)


def bootstrap(deal: Path, sites: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo.bootstrap", "--deal", str(deal), "--sites", sites]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)


def succeed(deal: Path, sites: str, *more: str) -> str:
    result = bootstrap(deal, sites, *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refuse(deal: Path, sites: str, *more: str) -> str:
    before = contents(deal)
    result = bootstrap(deal, sites, *more)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1, result.stderr
    after = contents(deal)
    certs = deal / "certs"
    assert {path: data for path, data in after.items() if certs not in path.parents} == {
        path: data for path, data in before.items() if certs not in path.parents
    }
    return result.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prompts(file: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_each_party_gets_its_own_files_and_no_others(dealt: Path) -> None:
    assert listed(dealt / "superlink") == ["current", "v1"]
    assert listed(dealt / "superlink" / "current") == [
        "ca.crt", "coordinator.pub", "crl.pem", "root.crt",
        "roster.json", "roster.sig", "server.crt", "server.key",
    ]  # fmt: skip
    assert listed(dealt / "coordinator") == ["roster.json", "roster.sig", "signing.key"]
    assert listed(dealt / "evaluator") == ["coordinator.pub", "signing.key"]
    assert listed(dealt / "root") == ["root.crt"]
    for site in "abc":
        volumes = dealt / "sites" / site
        assert listed(volumes / "supernode" / "current") == [
            "ca.crt", "client.crt", "client.key", "supernode.key", "supernode.pub",
        ]  # fmt: skip
        assert listed(volumes / "trainer" / "current") == [
            "coordinator.pub", "roster.json", "roster.sig", "signing.key",
        ]  # fmt: skip
        assert listed(volumes / "data") == ["records.jsonl"]
        assert listed(volumes / "state") == ["ledger.jsonl"]
        policy = load_policy(volumes / "policy" / "policy.toml")
        assert policy.models.digests == (base_digest(dealt / "models" / NAME),)
    assert listed(dealt / "held-out") == [
        "choices.json", "codes.jsonl", "deal.json", "wordings.jsonl",
    ]  # fmt: skip
    _, roster = load_roster(dealt / "coordinator")
    assert sorted(roster.sites) == ["a", "b", "c"]
    keys = [path for path in contents(dealt) if path.suffix == ".key"]
    keys += [path for path in contents(dealt) if path.parent.name in ("data", "held-out")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    versions = [path for path in dealt.rglob("v1") if dealt / "certs" not in path.parents]
    assert {stat.S_IMODE(path.stat().st_mode) for path in versions} == {0o700}


def test_a_rerun_has_nothing_to_do_changes_nothing_and_loads_neither_torch_nor_data_sets(
    dealt: Path,
) -> None:
    (dealt / "sites" / "a" / "policy" / "policy.toml").write_text("# the hospital's own edit\n")
    before = contents(dealt)
    code = (
        "import sys; from demo.bootstrap import main; "
        f"status = main(['--deal', {str(dealt)!r}, '--sites', 'a,b,c']); "
        "print(status, sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "nothing to do\n0 []\n"
    assert contents(dealt) == before


def test_more_sites_get_keys_and_records_and_the_first_ones_keep_theirs(dealt: Path) -> None:
    before = contents(dealt)
    add_sites(dealt, "de")
    printed = succeed(dealt, "a,b,c,d,e")
    assert "sites a, b, c keep the records that they had; those of d, e come from" in printed
    changed = {path for path, data in before.items() if path.read_bytes() != data}
    assert {path.name for path in changed} == {"roster.json", "roster.sig", "policy.toml"}
    _, roster = load_roster(dealt / "coordinator")
    assert sorted(roster.sites) == ["a", "b", "c", "d", "e"]
    held_out = prompts(dealt / "held-out" / "codes.jsonl")
    for site in "abcde":
        records = prompts(dealt / "sites" / site / "data" / "records.jsonl")
        assert len(records) >= 32
        assert held_out.isdisjoint(records)
    assert succeed(dealt, "a,b,c,d,e") == "nothing to do\n"
    assert succeed(dealt, "a,b") == "nothing to do\n"


def peers_of(deal: Path, site: str) -> list[str]:
    """The peers that a site's trainer would find when it is started."""
    volumes = deal / "sites" / site
    policy = load_policy(volumes / "policy" / "policy.toml")
    return sorted(load_peers(policy, volumes / "trainer" / "current", site))


def test_sites_pin_each_others_signing_keys_and_new_ones_are_pinned_too(dealt: Path) -> None:
    assert [peers_of(dealt, site) for site in "abc"] == [["b", "c"], ["a", "c"], ["a", "b"]]
    add_sites(dealt, "d")
    printed = succeed(dealt, "a,b,c,d")
    assert "a/policy/policy.toml: pins a, b, c, d; start trainer-a again" in printed
    assert [peers_of(dealt, site) for site in "ad"] == [["b", "c", "d"], ["a", "b", "c"]]
    assert succeed(dealt, "a,b,c,d") == "nothing to do\n"


def test_a_policy_that_somebody_has_edited_pins_nobody_new(dealt: Path) -> None:
    policy = dealt / "sites" / "b" / "policy" / "policy.toml"
    edited = policy.read_text().replace("rank = 32", "rank = 8")
    policy.write_text(edited)
    add_sites(dealt, "d")
    succeed(dealt, "a,b,c,d")
    assert policy.read_text() == edited
    assert peers_of(dealt, "b") == ["a", "c"]


def test_a_ledger_is_made_once_and_none_takes_a_lost_ones_place(dealt: Path) -> None:
    state = dealt / "sites" / "b" / "state"
    ledger = state / "ledger.jsonl"
    key = load_signing_key(dealt / "certs" / "sites" / "b" / "current" / "signing.key")
    head = Ledger(ledger, "b", key).head
    # A site that had begun to train privately: its audit log knows of a ledger.
    AuditLog(state / "audit.jsonl", key).append("described", ledger_head=head)
    ledger.unlink()
    assert "shows that this site had a ledger; restore it" in refuse(dealt, "a,b,c")
    assert not ledger.exists()


def test_what_was_renewed_is_dealt_as_a_new_version_and_lasting_keys_stay(dealt: Path) -> None:
    before = contents(dealt)
    rotate(dealt / "certs", ["b"])
    for _ in range(2):
        roll_over(dealt / "certs")
    (dealt / "superlink" / ".v2").mkdir()  # what an interrupted call leaves
    (dealt / "superlink" / ".v2" / "server.key").write_bytes(b"half")
    succeed(dealt, "a,b,c")
    for volume, source in (
        (dealt / "superlink", dealt / "certs" / "superlink"),
        (dealt / "sites" / "b" / "supernode", dealt / "certs" / "sites" / "b"),
    ):
        assert (volume / "current").readlink() == Path("v2")
        for path in (volume / "current").iterdir():
            assert path.read_bytes() == (source / "current" / path.name).read_bytes()
        assert (volume / "v1" / "ca.crt").read_bytes() == before[volume / "v1" / "ca.crt"]
    root = dealt / "certs" / "superlink" / "current" / "root.crt"
    assert (dealt / "root" / "root.crt").read_bytes() == root.read_bytes()
    trainer = dealt / "sites" / "b" / "trainer"
    for name in ("roster.json", "roster.sig"):
        held = (trainer / "current" / name).read_bytes()
        assert held == (dealt / "certs" / "coordinator" / name).read_bytes()
    for name in ("signing.key", "coordinator.pub"):
        assert (trainer / "current" / name).read_bytes() == before[trainer / "v1" / name]
    assert succeed(dealt, "a,b,c") == "nothing to do\n"
    roll_over(dealt / "certs")
    succeed(dealt, "a,b,c")


def test_what_an_interrupted_call_left_out_is_added(dealt: Path) -> None:
    before = contents(dealt)
    (dealt / "superlink" / "current").unlink()
    (dealt / "coordinator" / "roster.sig").unlink()
    (dealt / "sites" / "b" / "data" / "records.jsonl").rename(
        dealt / "sites" / "b" / "data" / "records.jsonl.new"
    )
    succeed(dealt, "a,b,c")
    assert contents(dealt) == before


def test_a_site_with_records_of_its_own_keeps_them(deal: Path) -> None:
    (deal / "sites" / "b" / "data" / "ours.csv").write_text("prompt,completion\n")
    succeed(deal, "a,b,c")
    assert listed(deal / "sites" / "b" / "data") == ["ours.csv"]


@pytest.mark.parametrize("volume", ["superlink", "evaluator", "sites/b/supernode"])
def test_a_volume_with_keys_of_another_authority_is_refused_before_anything_is_dealt(
    dealt: Path, tmp_path: Path, volume: str
) -> None:
    other = tmp_path / "other"
    make_all(other / "certs", ["a", "b", "c"], ["control"])
    for name in ("superlink", "evaluator", "sites/b/supernode"):
        (other / name).mkdir(parents=True, exist_ok=True)
    (dealt / volume).rename(tmp_path / "lost")
    source = {
        "superlink": "superlink",
        "evaluator": "evaluator",
        "sites/b/supernode": "sites/b",
    }[volume]
    (other / "certs" / source).rename(dealt / volume)
    (dealt / "sites" / "c" / "policy" / "policy.toml").unlink()  # something is left to do
    assert "belongs to another set of keys" in refuse(dealt, "a,b,c")


def test_a_lost_volume_of_all_keys_is_refused_and_no_new_authority_made(
    dealt: Path, tmp_path: Path
) -> None:
    (dealt / "certs").rename(tmp_path / "lost")
    (dealt / "certs").mkdir()
    assert "holds keys but" in refuse(dealt, "a,b,c")
    assert listed(dealt / "certs") == []


def test_expired_certificates_are_refused(deal: Path) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=100)
    make_all(deal / "certs", ["a", "b", "c"], ["control"], now=past)
    sentence = refuse(deal, "a,b,c")
    assert "The certificate of superlink ended on" in sentence
    assert "`make down`" in sentence


def test_another_seed_is_refused_because_its_held_out_texts_would_be_among_the_records(
    dealt: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    text = (ROOT / "experiments" / "icd10.toml").read_text()
    other.write_text(text.replace("seed = 1", "seed = 2"))
    assert "were dealt with seed 1" in refuse(dealt, "a,b,c", "--experiment", str(other))


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        ("a,c", "--sites a,c are not the letters from a on"),
        ("a,b,c,d", "sites/d/supernode is not a folder that user"),
        ("", "--sites  are not the letters"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    deal: Path, sites: str, sentence: str
) -> None:
    assert sentence in refuse(deal, sites)
    assert listed(deal / "certs") == []
