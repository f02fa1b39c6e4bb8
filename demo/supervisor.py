"""A set of named processes: started in order, waited for, restarted on request, all stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from demo.process import ManagedProcess
from fedqlora.errors import FederationError
from fedqlora.supervised import RESTART_STATUS

logger = logging.getLogger("demo")


class Supervisor:
    """Named processes, and a thread that restarts those that end with status 75."""

    def __init__(self, is_ready: Callable[[str], bool]) -> None:
        """Makes an empty set.

        Args:
            is_ready: whether the named process, which runs, answers where it serves.
        """
        self._is_ready = is_ready
        self._processes: dict[str, ManagedProcess] = {}
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def add(self, processes: Iterable[ManagedProcess]) -> None:
        """Adds processes that are not started yet."""
        self._processes |= {process.name: process for process in processes}

    def __getitem__(self, name: str) -> ManagedProcess:
        return self._processes[name]

    @property
    def names(self) -> list[str]:
        """Names in the order in which they were added."""
        return list(self._processes)

    def start(self, names: Sequence[str], timeout_seconds: float) -> None:
        """Starts processes together and waits until all of them answer.

        Raises:
            FederationError: one ended, or was not ready in time.
        """
        with self._lock:
            for name in names:
                self._processes[name].start()
        self.wait(lambda: [name for name in names if not self._answers(name)], timeout_seconds)

    def watch(self) -> None:
        """Begins to restart processes that end with status 75, as a container engine would."""
        self._watcher.start()

    def stop(self, name: str) -> None:
        """Ends one process with SIGTERM."""
        with self._lock:
            self._processes[name].stop()

    def kill(self, name: str) -> None:
        """Ends one process and all that it started with SIGKILL."""
        with self._lock:
            self._processes[name].kill()

    def stop_all(self, last: Sequence[str]) -> None:
        """Stops everything, at the end those named in `last`, one after the other.

        Safe to call twice.
        """
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with self._lock:
            first = [process for name, process in self._processes.items() if name not in last]
            for process in first:
                process.ask_to_stop()
            for process in first:
                process.stop()
            for name in last:
                if name in self._processes:
                    self._processes[name].stop()

    def wait(self, find_missing: Callable[[], Sequence[str]], timeout_seconds: float) -> None:
        """Waits until `find_missing` names no process.

        Raises:
            FederationError: one of those it names has ended, or time is up.
        """
        deadline = time.monotonic() + timeout_seconds
        while missing := find_missing():
            for process in (self._processes[name] for name in missing):
                if process.status not in (None, RESTART_STATUS):
                    raise FederationError(
                        f"{process.name} ended with status {process.status} "
                        f"({process.last_line()}): see {process.log}."
                    )
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{', '.join(missing)} was not ready within {timeout_seconds:.0f} seconds: see "
                    f"{self._processes[missing[0]].log} and the other logs beside it."
                )
            time.sleep(0.2)

    def _answers(self, name: str) -> bool:
        """Whether a process runs and answers."""
        return self._processes[name].running and self._is_ready(name)

    def _watch(self) -> None:
        while not self._stopping.wait(0.5):
            with self._lock:
                for process in self._processes.values():
                    if process.status == RESTART_STATUS:
                        logger.warning("%s asked to be started again.", process.name)
                        process.start()


def is_serving(socket: Path) -> bool:
    """Asks the standard gRPC health service on a unix socket."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2.0
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
