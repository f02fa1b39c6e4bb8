"""A whole federation as real processes on loopback: started, watched, and stopped without rest.

    with LocalFederation(certs=..., folder=..., runs=..., sites=[...]) as federation:
        result = federation.run(app, {"run": "config.toml"})

Processes by name: `superlink`, `serverapps` (the SuperExec that runs ServerApps), `evaluator`,
and per site `trainer-<site>`, `supernode-<site>` and `clientapps-<site>` (the SuperExec that runs
ClientApps). Each writes `<name>.log` in the federation's folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.commands import Layout, LocalSite, list_processes
from demo.forked import begin_loading
from demo.signals import StopSignals
from demo.supervisor import Supervisor, is_serving
from fedqlora.address import find_free_port
from fedqlora.errors import ConfigError
from server.bundle import pack
from server.control import ControlClient, RunValue
from server.runs import RunResult, wait_for_run

__all__ = ["LocalFederation", "LocalSite", "RunResult"]

SOCKET_PATH_BYTES = 103
"""Longest path of a unix socket that macOS takes; Linux takes 107."""

_CENTRE = ("superlink", "serverapps")


class LocalFederation:
    """SuperLink, SuperExec, sites and evaluator; a context manager that leaves nothing behind.

    Flower's own state (its database, its homes) and the sockets live in a temporary folder that
    goes with the federation; a run is continued from our checkpoints, not from Flower's state.
    Trainers' and the evaluator's state stays.
    """

    def __init__(
        self,
        *,
        certs: Path,
        folder: Path,
        runs: Path,
        sites: Sequence[LocalSite],
        models: Path | None = None,
        held_out: Path | None = None,
        state: Path | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout_seconds: float = 300.0,
    ) -> None:
        """Describes the federation; entering the context starts it.

        Args:
            certs: what `python -m certs make --out` made: superlink/, coordinator/, sites/.
            folder: for logs.
            runs: folder of run folders, told to the ServerApp as FEDQLORA_RUNS.
            sites: the hospitals.
            models: folder of base models; needed for trainers and evaluator.
            held_out: held-out set; None starts no evaluator.
            state: for the state of trainers and evaluator; None is `folder`. All runs under `runs`
                need the same: the centre knows each site's audit log from the runs before.
            environment: added to that of every process.
            start_timeout_seconds: how long all of it may take to become ready.
        """
        self._layout = Layout(
            certs=certs.resolve(),
            folder=folder.resolve(),
            state=(state or folder).resolve(),
            runs=runs.resolve(),
            scratch=Path(tempfile.gettempdir()) / f"fq-{os.urandom(4).hex()}",
            models=None if models is None else models.resolve(),
            held_out=None if held_out is None else held_out.resolve(),
            fleet=f"127.0.0.1:{find_free_port()}",
            control=f"127.0.0.1:{find_free_port()}",
            metrics=f"127.0.0.1:{find_free_port()}",
            extra=dict(environment or {}),
        )
        self._sites = list(sites)
        self._start_timeout_seconds = start_timeout_seconds
        self._site_keys: dict[str, bytes] = {}
        self._processes = Supervisor(self._is_ready)
        self._signals = StopSignals()

    def __enter__(self) -> Self:
        """Starts everything and waits until it is ready.

        Raises:
            ConfigError: a socket path would be too long, or a site has data but no policy.
            FederationError: a process ended or was not ready in time; all are stopped again.
        """
        self._signals.catch()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops every process, sites first so that they can say goodbye; safe to call twice."""
        self._signals.ignore()
        try:
            self._processes.stop_all(last=_CENTRE[::-1])
            shutil.rmtree(self._layout.scratch, ignore_errors=True)
        finally:
            self._signals.release()

    def run(
        self,
        app: Path,
        config: Mapping[str, RunValue],
        *,
        timeout_seconds: float = 3600.0,
        echo: Callable[[str], None] | None = None,
    ) -> RunResult:
        """Starts a run of the Flower app in `app` and waits for its end.

        Args:
            app: folder with the app's pyproject.toml.
            config: overrides of its run configuration.
            timeout_seconds: how long it may take.
            echo: called with each line that the ServerApp prints.

        Raises:
            FederationError: the run cannot be started or did not end in time.
        """
        run_id = self.start_run(app, config)
        return self.wait_for_run(run_id, timeout_seconds=timeout_seconds, echo=echo)

    def start_run(self, app: Path, config: Mapping[str, RunValue]) -> int:
        """Starts a run and returns its id at once; see `run`."""
        with self.control() as control:
            return control.start_run(pack(app), config)

    def wait_for_run(
        self,
        run_id: int,
        *,
        timeout_seconds: float = 3600.0,
        echo: Callable[[str], None] | None = None,
    ) -> RunResult:
        """Waits for a run to end; its output also goes to `serverapp-<run id>.log`.

        A SuperLink that is away meanwhile is waited for.

        Raises:
            FederationError: the run did not end in time.
        """
        log = self.log_file(f"serverapp-{run_id}")
        return wait_for_run(self.control, run_id, log, timeout_seconds=timeout_seconds, echo=echo)

    def kill(self, name: str) -> None:
        """Ends a process and all that it started with SIGKILL, as a crash would."""
        self._processes.kill(name)

    def stop_process(self, name: str) -> None:
        """Ends one process with SIGTERM, as an operator would."""
        self._processes.stop(name)

    def start_process(self, name: str) -> None:
        """Starts a process that was ended, and waits until it answers where it serves."""
        self._processes.start([name], self._start_timeout_seconds)

    def restart(self, name: str) -> None:
        """`stop_process`, then `start_process`."""
        self.stop_process(name)
        self.start_process(name)

    def kill_serverapp(self) -> bool:
        """Ends the running ServerApp with SIGKILL but not its SuperExec; whether there was one."""
        found = self._processes["serverapps"].find_members("flwr-serverapp")
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return bool(found)

    def running(self, name: str) -> bool:
        """Whether a process runs."""
        return self._processes[name].running

    def process_ids(self) -> dict[str, int]:
        """Process ids by name; each is also the id of that process's group."""
        return {name: self._processes[name].pid for name in self._processes.names}

    def log_file(self, name: str) -> Path:
        """The file that a process logs to."""
        return self._layout.folder / f"{name}.log"

    def read_log(self, name: str) -> str:
        """What a process has logged so far."""
        return self.log_file(name).read_text(encoding="utf-8", errors="replace")

    def socket_of(self, name: str) -> Path:
        """The unix socket of `evaluator` or `trainer-<site>`."""
        return self._layout.socket_of(name)

    def control(self) -> ControlClient:
        """A client of the SuperLink's Control API; use it as a context manager."""
        return ControlClient(self._layout.control, self._layout.authority)

    @property
    def fleet_address(self) -> str:
        """HOST:PORT of the Fleet API."""
        return self._layout.fleet

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of the SuperLink's metrics."""
        return self._layout.metrics

    @property
    def control_address(self) -> str:
        """HOST:PORT of the Control and Runtime APIs."""
        return self._layout.control

    def wait_for_sites(self, names: Sequence[str], timeout_seconds: float = 90.0) -> None:
        """Waits until the SuperNodes of these sites are online.

        Raises:
            FederationError: one of them ended, or was not online in time.
        """
        wanted = {self._site_keys[name]: name for name in names}

        def find_missing() -> list[str]:
            with self.control() as control:
                online = control.list_online()
            return [f"supernode-{name}" for key, name in wanted.items() if key not in online]

        self._processes.wait(find_missing, timeout_seconds)

    def _start(self) -> None:
        """Starts the centre, registers the sites' keys, then starts the sites."""
        layout = self._layout
        names = [f"trainer-{site.name}" for site in self._sites]
        if any(len(os.fsencode(layout.socket_of(name))) > SOCKET_PATH_BYTES for name in names):
            raise ConfigError(
                f"A unix socket in {layout.scratch} would have too long a path: set TMPDIR to a "
                "short folder such as /tmp."
            )
        for folder in (layout.folder, layout.runs):
            folder.mkdir(parents=True, exist_ok=True)
        layout.scratch.mkdir(mode=0o700)
        self._processes.add(list_processes(layout, self._sites))
        for name in self._processes.names:
            self.log_file(name).unlink(missing_ok=True)
        forked = {name for name in self._processes.names if self._processes[name].forked}
        if forked:
            begin_loading()
        for name in _CENTRE:
            self._processes.start([name], self._start_timeout_seconds)
        with self.control() as control:
            for site in self._sites:
                key = layout.certs / "sites" / site.name / "current" / "supernode.pub"
                self._site_keys[site.name] = control.register(key, site.name)
        self._processes.watch()
        others = [name for name in self._processes.names if name not in _CENTRE]
        # A fork waits until torch is loaded: what does not need it starts before.
        others.sort(key=forked.__contains__)
        self._processes.start(others, self._start_timeout_seconds)
        self.wait_for_sites([site.name for site in self._sites], self._start_timeout_seconds)

    def _is_ready(self, name: str) -> bool:
        """Whether a process answers where it serves; SuperNodes serve nowhere."""
        if name == "superlink":
            with self.control() as control:
                return control.answers()
        if name == "evaluator" or name.startswith("trainer-"):
            return is_serving(self.socket_of(name))
        return True
