"""The program `./site`, run by dash with the real openssl and sha256sum; no engine is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.signature import fingerprint_key, open_kit_key
from tests.deploy.kits import make_federation, make_kit, unpack

ROOT = Path(__file__).parents[2]


def call(kit: Path, *arguments: str | Path, home: Path | None = None) -> tuple[int, str]:
    """Exit status and everything that the program said."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    if home is not None:
        environment["SITE_HOME"] = str(home)
    done = subprocess.run(
        ["dash", kit / "site", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def make_home(kit: Path, tmp_path: Path) -> Path:
    """A site's folder as `./site init` leaves it, but for the keys, which the image makes."""
    home = tmp_path / "home"
    (home / "trust").mkdir(parents=True)
    shutil.copy(kit / "trust" / "kit.pub", home / "trust")
    shutil.copy(kit / "settings.env", home)
    release = home / "releases" / "0.1.0"
    shutil.copytree(kit, release)
    (home / "current").symlink_to("releases/0.1.0")
    (home / "site").symlink_to("current/site")
    return home


def test_a_kit_as_it_was_sent_is_accepted_and_shows_the_coordinators_fingerprint(
    kit: Path, certs: Path
) -> None:
    fingerprint = fingerprint_key(open_kit_key(certs))
    status, said = call(kit, "verify")
    assert (status, f"fingerprint: {fingerprint}" in said) == (0, True), said
    assert "Compare it" in said
    grouped = " ".join(fingerprint[i : i + 4] for i in range(0, 64, 4)).upper()
    assert call(kit, "verify", grouped)[0] == 0


def test_a_kit_that_somebody_signed_anew_is_well_formed_but_has_another_fingerprint(
    kit: Path, certs: Path, tmp_path: Path
) -> None:
    true = fingerprint_key(open_kit_key(certs))
    mallory = make_federation(tmp_path / "mallory")
    forged = unpack(make_kit(mallory, tmp_path / "forged"), tmp_path / "unpacked")
    assert call(forged, "verify")[0] == 0, "the attack: its own key fits its own signature"
    status, said = call(forged, "verify", true)
    assert status == 1
    assert "do not use it, call the coordinator" in said
    # A site that exists compares with the key that it trusts, and nobody has to look.
    assert call(forged, "verify", home=make_home(kit, tmp_path))[0] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda kit: (kit / ".env").write_text("FEDQLORA_SITE=b\n"), "/.env is missing or not"),
        (lambda kit: (kit / "trust" / "root.crt").unlink(), "/trust/root.crt is missing or not"),
        (lambda kit: (kit / "compose.override.yml").write_text("x"), "override.yml is no part"),
        (lambda kit: (kit / "extra").symlink_to("/etc/passwd"), "/extra is no part"),
        (lambda kit: (kit / "SHA256SUMS.sig").unlink(), "SHA256SUMS.sig is missing"),
        (lambda kit: (kit / "SHA256SUMS").write_text(""), "SHA256SUMS is not signed"),
    ],
    ids=["changed", "removed", "added", "link", "no-signature", "no-sums"],
)
def test_a_tampered_kit_is_refused_by_name(change: object, sentence: str, kit: Path) -> None:
    assert call(kit, "verify")[0] == 0
    change(kit)  # type: ignore[operator]
    status, said = call(kit, "verify")
    assert status == 1
    assert sentence in said
    assert said.count("\n") == 1


def test_a_tampered_kit_makes_no_site(kit: Path, tmp_path: Path) -> None:
    (kit / ".env").write_text("FEDQLORA_SITE=b\n")
    status, said = call(kit, "init", tmp_path / "home")
    assert (status, "missing or not" in said) == (1, True)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["frobnicate"], "frobnicate is no command"),
        (["accept"], "Name the coordinator's reply"),
        (["upgrade"], "Name the new kit"),
        (["audit"], "Write ./site audit verify"),
    ],
)
def test_misuse_has_status_2_and_one_sentence(
    arguments: list[str], sentence: str, kit: Path
) -> None:
    status, said = call(kit, *arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert sentence in said


def test_without_a_command_the_program_lists_its_commands(kit: Path) -> None:
    status, said = call(kit)
    assert status == 2
    for command in ("verify", "init", "accept", "preflight", "up", "upgrade", "rollback", "audit"):
        assert f"./site {command}" in said or f"| {command}" in said


ENGINE = """#!/bin/sh
# An engine in which every call does nothing and is well, and which writes the calls down.
echo "$@" >>"$ENGINE_CALLS"
case $* in
"image inspect --format"*) sed -n 's/^ *"id": "\\(.*\\)",*$/\\1/p' "$ENGINE_KIT/manifest.json" ;;
*"ledger init"*) echo "$ENGINE_LEDGER"; exit "$ENGINE_STATUS" ;;
esac
"""


def start(kit: Path, home: Path, ledger: str, status: int = 0) -> tuple[int, str, str]:
    """`./site up` at that engine: exit status, what was said, and the calls."""
    program = home / "bin" / "docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(ENGINE)
    program.chmod(0o755)
    calls = home / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["dash", kit / "site", "up"],
        env={
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "SITE_HOME": str(home),
            "ENGINE_CALLS": str(calls),
            "ENGINE_KIT": str(kit),
            "ENGINE_LEDGER": ledger,
            "ENGINE_STATUS": str(status),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, calls.read_text()


def test_the_first_start_makes_the_ledger_and_a_later_one_does_not(
    kit: Path, tmp_path: Path
) -> None:
    home = make_home(kit, tmp_path)
    status, said, calls = start(kit, home, "made /state/ledger.jsonl; back it up")
    assert status == 0, said
    assert "ledger of privacy spent: made, in the volume fedqlora-a_trainer-state" in said
    made = calls.splitlines()
    (call,) = [line for line in made if "ledger init" in line]
    assert "--network none" in call
    assert "--site a --state /state --keys /keys/current" in call
    # Compose makes the volume before anything else mounts it.
    assert [" create trainer" in line for line in made].index(True) < made.index(call)
    status, said, calls = start(kit, home, "made /state/ledger.jsonl; back it up")
    assert (status, "ledger" in said, "ledger init" in calls) == (0, False, False)


def test_where_a_ledger_was_lost_the_first_start_says_so_and_starts_nothing(
    kit: Path, tmp_path: Path
) -> None:
    home = make_home(kit, tmp_path)
    lost = "/state/audit.jsonl shows that this site had a ledger; restore it from a backup"
    status, said, calls = start(kit, home, lost, status=1)
    assert (status, lost in said) == (1, True)
    assert "up --detach" not in calls
    assert not (home / "ledger-made").exists()


@pytest.mark.parametrize("command", ["up", "stop", "status", "rollback"])
def test_before_init_the_other_commands_say_what_to_do(command: str, kit: Path) -> None:
    status, said = call(kit, command)
    assert status == 1
    assert "run ./site init first" in said


def test_preflight_names_every_problem_and_what_to_do(kit: Path, tmp_path: Path) -> None:
    """No engine, and a coordinator whose name does not resolve."""
    tools = tmp_path / "bin"
    tools.mkdir()
    needed = "dash basename date dirname getent head openssl readlink sed sha256sum tail timeout"
    for name in needed.split():
        (tools / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [tools / "dash", kit / "site", "preflight"],
        env={"PATH": str(tools)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].startswith("problem  engine: no Docker engine answers; install or start it")
    assert lines[1].startswith("problem  dns: superlink.example.org does not resolve; ask for it")
    assert lines[2].startswith("later    disk, records, keys: after ./site init")
    assert lines[3].startswith("error: 2 problems found")


def test_settings_and_policy_are_no_part_of_the_release(kit: Path, tmp_path: Path) -> None:
    """A hospital edits its own files, and its kit still fits the signature."""
    home = make_home(kit, tmp_path)
    (home / "settings.env").write_text("FEDQLORA_DATA=/mnt/records\n")
    assert call(home, "verify")[0] == 0


def test_an_archive_without_signature_or_with_another_is_refused(
    kit: Path, certs: Path, tmp_path: Path
) -> None:
    home = make_home(kit, tmp_path)
    new = make_kit(certs, tmp_path / "new", release="0.1.0-2")
    signature = Path(f"{new}.sig")
    signature.rename(tmp_path / "kept")
    assert "does not exist" in call(home, "upgrade", new)[1]
    signature.write_bytes((tmp_path / "kept").read_bytes()[:-1] + b"x")
    status, said = call(home, "upgrade", new)
    assert status == 1
    assert "is not signed with the key that this site trusts" in said
    assert {path.name for path in (home / "releases").iterdir()} == {"0.1.0"}


def test_a_kit_of_another_site_is_refused(kit: Path, certs: Path, tmp_path: Path) -> None:
    home = make_home(kit, tmp_path)
    status, said = call(home, "upgrade", make_kit(certs, tmp_path / "new", site="b"))
    assert status == 1
    assert "is a kit for site b, this is a" in said


def test_another_kit_under_a_name_that_is_taken_is_refused(
    kit: Path, certs: Path, tmp_path: Path
) -> None:
    home = make_home(kit, tmp_path)
    (home / "releases" / "0.1.0").rename(home / "releases" / "0.1.0-2")
    (home / "current").unlink()
    (home / "current").symlink_to("releases/0.1.0-2")
    new = make_kit(certs, tmp_path / "new", release="0.1.0-2")
    status, said = call(home, "upgrade", new)
    assert status == 1
    assert "is there already and is another" in said


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="an optional tool, in Debian")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=sh", ROOT / "deploy" / "site" / "site"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
