"""Programs that load torch, forked from one process that has loaded it already.

Trainers and evaluator of a local federation spend most of their start on importing torch,
transformers and PEFT: 7 s of processor time each, the same every time. Each still is a process of
its own, with its own log, environment and process group.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from multiprocessing import connection, forkserver, get_context, set_start_method
from pathlib import Path

from demo.program import Program

PROGRAMS = ("client.trainer", "server.evaluator")
"""Modules whose `main(arguments)` can be forked."""

_context = get_context("forkserver")
_context.set_forkserver_preload([*PROGRAMS, "demo.forked"])


def can_fork() -> bool:
    """Whether a process that has loaded torch may be forked here.

    CUDA does not survive a fork, and importing bitsandbytes begins to use it; nor do the
    frameworks that torch uses on macOS.
    """
    return sys.platform == "linux" and not Path("/dev/nvidiactl").exists()


def begin_loading() -> None:
    """Begins to load torch in the background; without effect when that was done before."""
    forkserver.ensure_running()


class ForkedProcess:
    """One of `PROGRAMS`, with as much of `subprocess.Popen` as its users need."""

    def __init__(self, program: Program) -> None:
        """Starts it in a new process group; its module is one of `PROGRAMS`."""
        # As a daemon it ends with us even where nobody stopped it.
        self._process = _context.Process(target=_become, args=(program,), daemon=True)
        self._process.start()
        self._lock = threading.Lock()  # the status can be read once
        assert self._process.pid is not None  # noqa: S101  it was started
        self.pid: int = self._process.pid
        """Its process id, which is also the id of its group."""

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        with self._lock:
            return self._process.exitcode

    def wait(self) -> int | None:
        """Waits for its end; returns the exit status."""
        connection.wait([self._process.sentinel])
        return self.poll()


def _become(program: Program) -> None:
    """Runs the program in this process and ends it."""
    os.setsid()
    os.chdir(program.folder)
    output = os.open(program.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(program.environment)
    # As in a process that was started anew: what libraries start is not ours to fork.
    set_start_method(None, force=True)
    if threads := program.environment.get("OMP_NUM_THREADS"):
        # OpenMP read the variable when it was loaded.
        importlib.import_module("torch").set_num_threads(int(threads))
    sys.exit(importlib.import_module(program.module).main(list(program.arguments)))
