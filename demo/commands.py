"""The command line and environment of every process of a local federation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.process import ManagedProcess
from demo.program import Program
from fedqlora.address import find_free_port
from fedqlora.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """One hospital of a local federation."""

    name: str
    """Its name, as in its certificate folder."""
    data: Path | None = None
    """Data file or folder; None starts no trainer."""
    policy: Path | None = None
    """Its `policy.toml`; needed with `data`."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a local federation's files and addresses are; all paths absolute."""

    certs: Path
    """What `python -m certs make --out` made."""
    folder: Path
    """Logs."""
    state: Path
    """State of trainers and evaluator, which outlives a run: audit logs, replay windows."""
    runs: Path
    """Run folders."""
    scratch: Path
    """Sockets, Flower's database and homes; gone with the federation."""
    models: Path | None
    """Base models."""
    held_out: Path | None
    """Held-out set; None means no evaluator."""
    fleet: str
    """HOST:PORT of the Fleet API."""
    control: str
    """HOST:PORT of the Control and Runtime APIs."""
    metrics: str
    """HOST:PORT of the SuperLink's metrics."""
    extra: Mapping[str, str]
    """Environment variables for every process."""

    @property
    def authority(self) -> Path:
        """The authority of the SuperLink's certificate."""
        return self.certs / "superlink" / "current" / "root.crt"

    def socket_of(self, name: str) -> Path:
        """The unix socket of `evaluator` or `trainer-<site>`."""
        return self.scratch / f"{name}.sock"


def list_processes(layout: Layout, sites: Sequence[LocalSite]) -> list[ManagedProcess]:
    """Describes all processes, the centre's first.

    Raises:
        ConfigError: a site has data but no policy or models.
    """
    processes = [_superlink(layout), _serverapps(layout)]
    if layout.held_out is not None:
        processes.append(_evaluator(layout, layout.held_out))
    # Trainers share the cores: torch would otherwise start as many threads in each.
    threads = max(1, (os.cpu_count() or 1) // max(1, len(sites)))
    for site in sites:
        if site.data is not None:
            processes.append(_trainer(layout, site, site.data, threads))
        processes.extend(_supernode(layout, site))
    return processes


def _superlink(layout: Layout) -> ManagedProcess:
    arguments = ["--certs", layout.certs / "superlink", "--state", layout.scratch / "superlink"]
    addresses = ["--fleet", layout.fleet, "--control", layout.control]
    addresses += ["--metrics", layout.metrics]
    return _describe(layout, "superlink", "server.superlink", *arguments, *addresses)


def _serverapps(layout: Layout) -> ManagedProcess:
    return _superexec(
        layout,
        "serverapps",
        layout.control,
        layout.authority,
        layout.scratch / "superlink" / "superexec.secret",
        FEDQLORA_RUNS=layout.runs,
        FEDQLORA_COORDINATOR=layout.certs / "coordinator",
        FEDQLORA_EVALUATOR_SOCKET=layout.socket_of("evaluator"),
    )


def _evaluator(layout: Layout, held_out: Path) -> ManagedProcess:
    if layout.models is None:
        raise ConfigError("An evaluator needs the folder of base models: give `models`.")
    arguments = ["--held-out", held_out, "--models", layout.models]
    folder = layout.certs / "evaluator"
    keys = ["--keys", folder]
    state = ["--state", layout.state / "evaluator", "--socket", layout.socket_of("evaluator")]
    return _describe(layout, "evaluator", "server.evaluator", *arguments, *keys, *state)


def _trainer(layout: Layout, site: LocalSite, data: Path, threads: int) -> ManagedProcess:
    if site.policy is None or layout.models is None:
        raise ConfigError(
            f"Site {site.name} has data but no policy or no folder of models: give all three."
        )
    name = f"trainer-{site.name}"
    arguments = ["--site", site.name, "--data", data.resolve(), "--models", layout.models]
    keys = ["--policy", site.policy.resolve(), "--keys", _site_keys(layout, site)]
    state = ["--state", layout.state / name, "--socket", layout.socket_of(name)]
    return _describe(
        layout,
        name,
        "client.trainer",
        *arguments,
        *keys,
        *state,
        OMP_NUM_THREADS=threads,
    )


def _supernode(layout: Layout, site: LocalSite) -> list[ManagedProcess]:
    name = f"supernode-{site.name}"
    api, handover = f"127.0.0.1:{find_free_port()}", layout.scratch / f"handover-{site.name}"
    arguments = ["--keys", _site_keys(layout, site), "--superlink", layout.fleet]
    arguments += ["--state", layout.scratch / name, "--clientapp-api", api, "--handover", handover]
    if site.policy is not None:
        arguments += ["--policy", site.policy.resolve()]
    return [
        _describe(layout, name, "client.supernode", *arguments),
        _superexec(
            layout,
            f"clientapps-{site.name}",
            api,
            handover / "ca.crt",
            handover / "secret",
            FEDQLORA_TRAINER_SOCKET=layout.socket_of(f"trainer-{site.name}"),
        ),
    ]


def _site_keys(layout: Layout, site: LocalSite) -> Path:
    return layout.certs / "sites" / site.name / "current"


def _superexec(
    layout: Layout, name: str, api: str, authority: Path, secret: Path, **environment: object
) -> ManagedProcess:
    """A SuperExec for one Runtime API, with a home of its own for Flower."""
    arguments = ["--runtime-api", api, "--root-certificates", authority, "--secret", secret]
    environment["FLWR_HOME"] = layout.scratch / name
    return _describe(layout, name, "fedqlora.superexec", *arguments, **environment)


def _describe(
    layout: Layout, name: str, module: str, *arguments: object, **environment: object
) -> ManagedProcess:
    """A process with the environment that all share, and its own variables on top."""
    shared = {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    program = Program(
        module=module,
        arguments=[str(argument) for argument in arguments],
        log=layout.folder / f"{name}.log",
        environment={
            **{key: value for key, value in os.environ.items() if key != "FLWR_HOME"},
            **shared,
            **layout.extra,
            **{key: str(value) for key, value in environment.items()},
        },
        folder=REPOSITORY,
    )
    return ManagedProcess(name, program)
