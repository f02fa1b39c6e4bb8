"""Preflight: one sentence and status 2 for each thing that is wrong, before anything starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cluster import RenderError
from deploy.folders import check_folders, check_readable, read_settings
from deploy.preflight import main, read_devices

CARDS = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
  MIG 1g.5gb      Device  0: (UUID: MIG-1111)
  MIG 1g.5gb      Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
"""

Programs = Callable[..., None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Programs named docker and nvidia-smi that answer as an engine of the given kind does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FLEET_PORT", str(_free_port()))

    def write(
        engine: str = "20.10.24+dfsg1",
        compose: str = "2.26.1-4",
        buildx: str = "github.com/docker/buildx v0.13.1",
        runtimes: str = '{"runc":{}}',
        services: str = "",
        ports: str = "",
        cards: str | None = None,
    ) -> None:
        answers = {
            "version --format*": engine,
            "compose version*": compose,
            "buildx version*": buildx,
            "info*": runtimes,
            "ps --format*": ports,
            "ps -a*": services,
        }
        cases = "".join(
            f"  '{asked[:-1]}'*) {f'printf %s {_quote(said)}' if said else 'exit 1'} ;;\n"
            if asked[:2] != "ps"
            else f"  '{asked[:-1]}'*) printf %s {_quote(said)} ;;\n"
            for asked, said in answers.items()
        )
        _program(folder / "docker", f'case "$*" in\n{cases}  *) exit 9 ;;\nesac\n')
        if cards is not None:
            _program(folder / "nvidia-smi", f"printf %s {_quote(cards)}\n")

    return write


def _quote(text: str) -> str:
    return "'" + text + "'"


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence with which preflight ends."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_machine_that_has_everything_passes(programs: Programs) -> None:
    programs(runtimes='{"nvidia":{},"runc":{}}', cards=CARDS)
    assert main(["cluster", "--sites", "3"]) == 0
    assert main(["cluster", "--sites", "1", "--gpus", ""]) == 0
    assert main(["cluster", "--sites", "1", "--gpus", "MIG-1111,MIG-2222"]) == 0
    assert main(["cluster", "--sites", "5", "--shared-gpu", "GPU-bbbb"]) == 0


def test_without_a_docker_command_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "There is no docker command" in refusal(capsys, "cluster", "--sites", "3")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ({"engine": ""}, "No Docker engine answers"),
        ({"engine": "19.03.15"}, "Docker Engine 19.03.15 is too old"),
        ({"compose": ""}, "no Compose plugin"),
        ({"compose": "2.23.3"}, "Docker Compose 2.23.3 is too old"),
        ({"buildx": ""}, "no buildx plugin"),
    ],
)
def test_an_engine_that_is_missing_or_too_old_is_refused(
    kind: dict[str, str], sentence: str, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(**kind)
    assert sentence in refusal(capsys, "cluster", "--sites", "3")


@pytest.mark.parametrize("sites", ["0", "27", "three", "-1", ""])
def test_a_number_of_sites_that_cannot_be_is_refused(
    sites: str, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs()
    assert f"SITES={sites} cannot be" in refusal(capsys, "cluster", f"--sites={sites}")


def test_a_port_in_use_is_refused_unless_our_own_superlink_has_it(
    programs: Programs,
    busy_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLEET_PORT", str(busy_port))
    programs()
    assert f"Port {busy_port} cannot be used" in refusal(capsys, "cluster", "--sites", "3")
    programs(ports=f"0.0.0.0:{busy_port}->9092/tcp")
    assert main(["cluster", "--sites", "3"]) == 0
    monkeypatch.setenv("FLEET_PORT", "99999")
    assert "FLEET_PORT=99999 is no port" in refusal(capsys, "cluster", "--sites", "3")


@pytest.mark.parametrize(
    ("kind", "gpus", "sentence"),
    [
        ({}, "0,1", "No NVIDIA GPU answers"),
        ({"cards": ""}, "0,1", "No NVIDIA GPU answers"),
        ({"cards": CARDS}, "0,1", "install the NVIDIA container toolkit"),
        ({"cards": CARDS, "runtimes": '{"nvidia":{}}'}, "0,2", "This machine has no GPU 2"),
        ({"cards": CARDS, "runtimes": '{"nvidia":{}}'}, "0,GPU-aaaa", "are one device"),
    ],
)
def test_a_gpu_that_containers_cannot_have_is_one_clear_error(
    kind: dict[str, str],
    gpus: str,
    sentence: str,
    programs: Programs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs(**kind)
    assert sentence in refusal(capsys, "cluster", "--sites", "1", "--gpus", gpus)


def test_devices_are_known_by_index_by_id_and_by_slice() -> None:
    assert read_devices(CARDS) == {
        "0": "GPU-aaaa",
        "GPU-aaaa": "GPU-aaaa",
        "MIG-1111": "MIG-1111",
        "MIG-2222": "MIG-2222",
        "1": "GPU-bbbb",
        "GPU-bbbb": "GPU-bbbb",
    }


def test_an_unknown_site_number_is_refused(
    programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(services="superlink\ntrainer-a\ntrainer-b\n")
    assert main(["logs", "--site", "2"]) == 0
    assert capsys.readouterr().out == "trainer-b supernode-b clientapp-b\n"
    for site in ("3", "0", "27", "b", "²"):
        assert f"SITE={site} is not in the cluster" in refusal(capsys, "logs", "--site", site)
    programs()
    assert "No development cluster is up" in refusal(capsys, "logs", "--site", "1")


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A hospital's folder with all that a site needs; returns its .env."""
    home = tmp_path / "site"
    files = {
        "data/records.jsonl": "{}",
        "policy/policy.toml": "",
        "models/base/config.json": "{}",
        **{f"keys/trainer/current/{name}": "" for name in ("signing.key", "coordinator.pub")},
        **{
            f"keys/supernode/current/{name}": ""
            for name in ("client.key", "client.crt", "ca.crt", "supernode.key")
        },
    }
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    for path in (home, *home.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    env = home / ".env"
    env.write_text("FEDQLORA_SITE=a # ours\nFEDQLORA_SUPERLINK='superlink.example.org:9092'\n")
    return env


def check(env: Path) -> None:
    """What `deploy.preflight site` checks of the folders."""
    check_folders(read_settings(env), env.parent)


def test_a_hospital_that_has_everything_passes(hospital: Path, programs: Programs) -> None:
    programs()
    assert main(["site", "--env", str(hospital)]) == 0
    assert read_settings(hospital) == {
        "FEDQLORA_SITE": "a",
        "FEDQLORA_SUPERLINK": "superlink.example.org:9092",
    }


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("FEDQLORA_SITE=", "FEDQLORA_SITE is not set"),
        ("FEDQLORA_SUPERLINK=", "FEDQLORA_SUPERLINK is not set"),
        ("FEDQLORA_SUPERLINK=superlink", "is not HOST:PORT"),
        ("FEDQLORA_DATA=./nowhere", "FEDQLORA_DATA: the folder .*nowhere does not exist"),
        ("FEDQLORA_MODELS=./nowhere", "FEDQLORA_MODELS: the folder .*nowhere does not exist"),
        ("FEDQLORA_DATA=./policy/policy.toml", "FEDQLORA_DATA: the folder .* does not exist"),
        ("FEDQLORA_POLICY=./data", r"FEDQLORA_POLICY: .*policy\.toml does not exist"),
        ("FEDQLORA_KEYS_TRAINER=./keys/supernode", r"signing\.key does not exist"),
        ("FEDQLORA_KEYS_SUPERNODE=./keys/trainer", r"client\.key does not exist"),
    ],
)
def test_a_setting_with_which_a_site_cannot_work_is_refused(
    line: str, sentence: str, hospital: Path
) -> None:
    with hospital.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(RenderError, match=sentence):
        check(hospital)


@pytest.mark.parametrize("name", ["data", "data/records.jsonl", "policy/policy.toml"])
def test_what_the_containers_user_cannot_read_is_refused_with_its_path(
    name: str, hospital: Path
) -> None:
    check(hospital)
    path = hospital.parent / name
    path.chmod(path.stat().st_mode & ~0o7)
    with pytest.raises(RenderError, match=f"user 10001 .* cannot read the .* {path}"):
        check(hospital)


def test_an_empty_data_folder_is_refused(hospital: Path) -> None:
    (hospital.parent / "data" / "records.jsonl").unlink()
    with pytest.raises(RenderError, match="holds no file"):
        check(hospital)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_bits_that_count_are_those_of_the_containers_user(tmp_path: Path) -> None:
    """A folder of user 10001 itself may be closed to all others, and the other way round."""
    tmp_path.chmod(0o700)
    with pytest.raises(RenderError):
        check_readable("KEY", tmp_path)
    os.chown(tmp_path, 10001, 10001)
    check_readable("KEY", tmp_path)
    tmp_path.chmod(0o077)
    with pytest.raises(RenderError):
        check_readable("KEY", tmp_path)
    os.chown(tmp_path, 0, 10001)
    tmp_path.chmod(0o750)
    check_readable("KEY", tmp_path)


def test_a_missing_env_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "copy .env.example there" in refusal(capsys, "site", "--env", str(tmp_path / ".env"))
