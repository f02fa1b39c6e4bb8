"""One program that the demo started: its log file, its process group, and its certain end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo.forked import PROGRAMS, ForkedProcess, can_fork
from demo.program import Program


class ManagedProcess:
    """A program in a process group of its own, so that what it starts ends with it.

    A group of its own also keeps a Ctrl-C in the terminal away from it: the demo stops its
    processes in order.
    """

    def __init__(self, name: str, program: Program) -> None:
        """Names the program, such as `trainer-a`; `start` runs it."""
        self.name = name
        self._program = program
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None
        self._ended = False  # the whole group is gone: its number may be another's by now

    def start(self) -> None:
        """Starts the program; what is left of an earlier start is ended first."""
        self.kill()
        self._ended = False
        self._process = ForkedProcess(self._program) if self.forked else self._start_anew()

    @property
    def log(self) -> Path:
        """The file that its output is appended to."""
        return self._program.log

    @property
    def forked(self) -> bool:
        """Whether it is forked from a process that has loaded torch."""
        return self._program.module in PROGRAMS and can_fork()

    def _start_anew(self) -> subprocess.Popen[bytes]:
        program = self._program
        with program.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", program.module, *program.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=program.environment,
                cwd=program.folder,
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, which is also the id of its group."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    def ask_to_stop(self) -> None:
        """Sends SIGTERM to the whole group."""
        self._signal_group(signal.SIGTERM)

    def stop(self, grace_seconds: float = 15.0) -> None:
        """Ends it: SIGTERM, then SIGKILL to whatever of its group is left."""
        if self.running:
            self.ask_to_stop()
            self.wait(grace_seconds)
        self.kill()

    def kill(self) -> None:
        """Ends the whole group at once with SIGKILL."""
        if self._process is not None and not self._ended:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            self._ended = True

    def wait(self, seconds: float) -> bool:
        """Waits for the program itself to end; returns whether it has."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.running

    def last_line(self) -> str:
        """The last line of its log that is not empty."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""

    def find_members(self, program: str) -> list[int]:
        """Process ids in its group of a program by name, such as `flwr-serverapp`."""
        found = subprocess.run(  # noqa: S603
            ["pgrep", "-g", str(self.pid), "-x", program],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def _signal_group(self, number: signal.Signals) -> None:
        """Signals every process of the group; an empty group is fine."""
        if self._process is not None and not self._ended:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                # A moment after its fork it has no group yet.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, number)
