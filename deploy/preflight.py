"""Refusals before anything starts: the engine, the port, the GPUs, a hospital's folders.

    python3 -m deploy.preflight cluster --sites 3 [--gpus 0,1,2,3 | --shared-gpu 0]
    python3 -m deploy.preflight site --env deploy/site/.env
    python3 -m deploy.preflight logs --site 2

One sentence and status 2 on the first thing that is wrong. Nothing but the standard library: it
runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.cluster import LETTERS, RenderError, site_names
from deploy.folders import check_folders, read_settings
from deploy.overlay import choose_devices, render_overlay

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (2, 24)


def check_engine() -> None:
    """Refuses a missing or too old engine, Compose or buildx.

    Raises:
        RenderError: one of them.
    """
    try:
        engine = _ask("version", "--format", "{{.Server.Version}}")
    except FileNotFoundError:
        raise RenderError(
            "There is no docker command: install Docker Engine 20.10 or newer."
        ) from None
    if engine is None:
        raise RenderError(
            "No Docker engine answers: start it, or give this user access to it (`docker info`)."
        )
    if _version(engine) < OLDEST_ENGINE:
        raise RenderError(f"Docker Engine {engine} is too old: install 20.10 or newer.")
    compose = _ask("compose", "version", "--short")
    if compose is None:
        raise RenderError("Docker has no Compose plugin: install Compose 2.24 or newer.")
    if _version(compose) < OLDEST_COMPOSE:
        raise RenderError(f"Docker Compose {compose} is too old: install 2.24 or newer.")
    if _ask("buildx", "version") is None:
        raise RenderError("Docker has no buildx plugin: install it, the images are built with it.")


def check_port(text: str, project: str) -> None:
    """Refuses a Fleet port that something else has; our own SuperLink may have it already.

    Raises:
        RenderError: it is no port, or not free.
    """
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise RenderError(f"FLEET_PORT={text} is no port: take a number from 1 to 65535.")
    own = _ask("ps", "--format", "{{.Ports}}", *_labels(project, "superlink")) or ""
    if re.search(rf":{text}->", own):
        return
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(text)))
        except OSError as error:
            raise RenderError(
                f"Port {text} cannot be used ({error.strerror}): stop what uses it, or choose "
                "another with FLEET_PORT."
            ) from None


def check_gpus(devices: Sequence[str]) -> None:
    """Refuses GPUs that are not there, or that containers cannot get.

    Raises:
        RenderError: no driver, no toolkit, an unknown device, or one given in two spellings.
    """
    runtimes = _ask("info", "--format", "{{json .Runtimes}}") or ""
    try:
        listed = _run("nvidia-smi", "-L")
    except FileNotFoundError:
        listed = None
    if listed is None or "GPU " not in listed:
        raise RenderError(
            "No NVIDIA GPU answers to `nvidia-smi -L`: install its driver, or leave GPU=1 out."
        )
    if '"nvidia"' not in runtimes:
        raise RenderError(
            "Docker cannot give containers a GPU: install the NVIDIA container toolkit and run "
            "`nvidia-ctk runtime configure --runtime=docker`."
        )
    known = read_devices(listed)
    seen: dict[str, str] = {}
    for device in devices:
        if device not in known:
            raise RenderError(
                f"This machine has no GPU {device}: it has {', '.join(known)} (`nvidia-smi -L`)."
            )
        if known[device] in seen:
            raise RenderError(
                f"GPU {seen[known[device]]} and GPU {device} are one device: give each site its "
                "own, or set SHARED_GPU to share one on purpose."
            )
        seen[known[device]] = device


def read_devices(listed: str) -> dict[str, str]:
    """The devices of `nvidia-smi -L`: each index and id, and the id of the device it means."""
    devices: dict[str, str] = {}
    for line in listed.splitlines():
        found = re.match(r"\s*(GPU|MIG)\b.*\(UUID:\s*([^)\s]+)\)", line)
        if found is None:
            continue
        if index := re.match(r"GPU (\d+):", line):
            devices[index.group(1)] = found.group(2)
        devices[found.group(2)] = found.group(2)
    return devices


def choose_services(site: str, project: str) -> list[str]:
    """The services of one site of the running cluster, given its number.

    Raises:
        RenderError: there is no such site.
    """
    listed = _ask(
        "ps", "-a", "--format", '{{.Label "com.docker.compose.service"}}', *_labels(project)
    )
    names = {name for name in (listed or "").split() if name.startswith("trainer-")}
    if not names:
        raise RenderError("No development cluster is up: start it with `make up`.")
    number = int(site) if site.isascii() and site.isdigit() else 0
    if not 1 <= number <= len(LETTERS) or f"trainer-{LETTERS[number - 1]}" not in names:
        raise RenderError(
            f"SITE={site} is not in the cluster: its sites have the numbers 1 to {len(names)}."
        )
    return [f"{role}-{LETTERS[number - 1]}" for role in ("trainer", "supernode", "clientapp")]


def _labels(project: str, service: str = "") -> list[str]:
    """Filters for the development cluster's containers."""
    labels = [f"com.docker.compose.project={project}"]
    labels += [f"com.docker.compose.service={service}"] if service else []
    return [part for label in labels for part in ("--filter", f"label={label}")]


def _ask(*arguments: str) -> str | None:
    """What docker prints; None where it fails."""
    return _run("docker", *arguments)


def _run(*command: str) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else None


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version such as 20.10.24+dfsg1."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def check_cluster(
    sites: int,
    gpus: str | None,
    shared_gpu: str | None,
    environment: Mapping[str, str],
    project: str,
) -> None:
    """Everything that `make up` needs.

    Raises:
        RenderError: the first thing that is wrong.
    """
    site_names(sites)
    devices: list[str] = []
    if gpus is not None or shared_gpu is not None:
        devices = choose_devices(sites, gpus or "") if shared_gpu is None else [shared_gpu]
        render_overlay(sites, devices, shared=shared_gpu is not None)
    check_engine()
    if devices:
        check_gpus(devices)
    check_port(environment.get("FLEET_PORT") or "9092", project)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="deploy.preflight", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cluster = commands.add_parser("cluster", help="what `make up` needs")
    cluster.add_argument("--sites", required=True)
    cluster.add_argument("--project", default="fedqlora", help="Compose's name of it")
    devices = cluster.add_mutually_exclusive_group()
    devices.add_argument("--gpus")
    devices.add_argument("--shared-gpu")
    site = commands.add_parser("site", help="what a hospital needs")
    site.add_argument("--env", type=Path, required=True, help="its .env, beside compose.yml")
    logs = commands.add_parser("logs", help="print the services of one site")
    logs.add_argument("--project", default="fedqlora", help="Compose's name of the cluster")
    logs.add_argument("--site", required=True, help="its number: 1 is a")
    options = parser.parse_args(arguments)
    try:
        if options.command == "cluster":
            number = (
                int(options.sites) if options.sites.isascii() and options.sites.isdigit() else 0
            )
            if not number:
                raise RenderError(f"SITES={options.sites} cannot be: take a number from 1 to 26.")
            check_cluster(number, options.gpus, options.shared_gpu, os.environ, options.project)
        elif options.command == "site":
            check_folders(read_settings(options.env), options.env.resolve().parent)
            check_engine()
        else:
            sys.stdout.write(" ".join(choose_services(options.site, options.project)) + "\n")
    except RenderError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
