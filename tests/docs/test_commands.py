"""Every command of the documentation exists as it is written; those on keys are run."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/attacks.md",
    "docs/continual.md",
    "docs/runbook.md",
    "docs/stories.md",
    "docs/threat-model.md",
)
_BEGINNING = re.compile(r"(make [a-z]|python3? -m [\w.]*\w( |$)|docker compose run --rm admin )")
_TARGETS = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
_SETTINGS = re.compile(r"^([A-Z][A-Z_]*) [?:]?=", re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_commands(text: str) -> list[str]:
    """The commands in a page's indented and inline code, without comments, each once."""
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    spans = [" ".join(span.split()) for span in inline]
    parts = [part for line in [*lines, *spans] for part in re.split(r" # |  +#|&&|; |`", line)]
    found = [part.strip(" ()`") for part in parts]
    return list(dict.fromkeys(one for one in found if _BEGINNING.match(one)))


COMMANDS = sorted(
    {one for page in PAGES for one in read_commands((ROOT / page).read_text("utf-8"))}
)


def list_words(command: str) -> list[str]:
    """Its words; what a reader may leave out stands in brackets and counts as well."""
    return shlex.split(command.replace("[", " ").replace("]", " "), comments=True)


@cache
def show_help(*command: str) -> str:
    """What a program says of its options."""
    line = [sys.executable, "-m", *command, "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_make(words: list[str]) -> None:
    """Every target and every variable is the Makefile's."""
    for word in words:
        name = re.match(r"([A-Z][A-Z_]*)=", word)
        if name:
            assert name[1] in [*_SETTINGS.findall(MAKEFILE), "FLEET_PORT"], word
        else:
            assert word in _TARGETS.findall(MAKEFILE), word


def check_module(module: str, words: list[str]) -> None:
    """The module exists; its subcommand is one of those that it has and takes the options."""
    assert importlib.util.find_spec(module) is not None, module
    options = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    first = words[0].split("|") if words and re.fullmatch(r"[a-z][a-z|-]*", words[0]) else []
    for subcommand in first:
        assert re.search(rf"[{{,]{subcommand}[,}}]", show_help(module)), subcommand
    if first or options:
        shown = "".join(show_help(module, one) for one in first) or show_help(module)
        for option in options:
            assert option in shown, option


def check(command: str) -> None:
    """Refuses a command that is not there as it is written."""
    words = list_words(command)
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] == "docker":
        check_module("server", words[5:])
    else:
        check_module(words[2], words[3:])


def test_the_pages_hold_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_options(command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    ["make rotate-keys", "make revoke SIET=b", "python -m certs verify --conect x",
     "python -m no.such.module", "docker compose run --rm admin evikt b"],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check(command)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a coordinator has it, with a certs/out of its own."""
    folder = tmp_path_factory.mktemp("home")
    for one in ROOT.iterdir():
        if one.name not in ("certs", ".git", "runs"):
            (folder / one.name).symlink_to(one)
    (folder / "certs").mkdir()
    for one in (ROOT / "certs").glob("*.py"):
        shutil.copy(one, folder / "certs")
    return folder


def run(home: Path, line: str, *, status: int = 0) -> str:
    """Runs one line of a page in a shell; it ends with the status."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=home,
        # `make test` would hand its own variables down.
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, (line, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
def test_the_runbooks_commands_on_keys_do_what_it_says_in_the_order_of_its_pages(
    home: Path,
) -> None:
    page = (ROOT / "docs" / "runbook.md").read_text("utf-8")
    # No cluster is meant, whoever has one up; nobody serves the address that a reader puts in.
    page = page.replace(" CONNECT=host:9092", "")

    def follow(title: str) -> str:
        section = re.split(r"^##+ ", page.split(f"# {title}\n", 1)[1], flags=re.MULTILINE)[0]
        lines = [line.split("  #")[0] for line in re.findall(r"^    (\S.*)$", section, re.M)]
        assert lines, title
        return "".join(run(home, line.replace("make ", "make CLUSTER=0 ")) for line in lines)

    assert "superlink: " in run(home, "make CLUSTER=0 certs")
    assert "nothing to do" in run(home, "make CLUSTER=0 certs")
    assert " replaced by " in follow("Rotate")
    assert re.findall(r"^stage done: (\w+)", follow("Roll the authority over"), re.MULTILINE) == [
        "trust",
        "switch",
        "retire",
    ]
    assert "site a" in follow("Back up and restore the authority")
    assert "revoked, " in run(home, "make CLUSTER=0 revoke SITE=b")
    assert '"problems": []' in run(home, "make CLUSTER=0 verify-certs JSON=1")
    run(home, "make CLUSTER=0 revoke", status=2)
