"""Starts ServerApps and ClientApps by forking a process that has imported what each of them needs.

The fork server is itself a fork of the SuperExec, made before that has a thread or a connection,
so that Flower is imported once for both. Each app still is a process of its own.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import flwr.clientapp
import flwr.serverapp  # noqa: F401  imported for the children, as are the next three
import grpc  # noqa: F401
import httpcore  # noqa: F401
import numpy  # noqa: F401
from flwr.superlink.cli.flwr_serverapp import flwr_serverapp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

PROGRAMS: dict[str, Callable[[], None]] = {
    "flwr-serverapp": flwr_serverapp,
    "flwr-clientapp": flwr_clientapp,
}

# Started at once, a ClientApp finds messages that the SuperNode is still receiving, and Flower
# would look again after 1 s, 2 s, 4 s (docs/adr/0005-polling.md).
_PULL = "pull_and_inflate_object_from_tree"
vars(run_clientapp)[_PULL] = functools.partial(vars(run_clientapp)[_PULL], initial_backoff=0.1)


class ForkServer:
    """The SuperExec's handle of its fork server, which ends when this process does."""

    def __init__(self) -> None:
        """Forks; nothing else may run in this process yet."""
        commands, self._commands = os.pipe()
        self._ends, ends = os.pipe()
        self.last_start = time.monotonic()
        """When an app was started last, or this program; a monotonic clock, in seconds."""
        # Counted apart: whoever starts apps and whoever asks `busy` may be two threads.
        self._started = self._ended = 0
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._commands)
            os.close(self._ends)
            _serve(commands, ends)
        os.close(commands)
        os.close(ends)
        os.set_blocking(self._ends, False)

    def start(self, command: Sequence[str]) -> None:
        """Starts one of `PROGRAMS` with its arguments."""
        self.last_start = time.monotonic()
        self._started += 1
        os.write(self._commands, json.dumps(list(command)).encode() + b"\n")

    @property
    def running(self) -> bool:
        """Whether apps can be started."""
        with suppress(ChildProcessError):
            return os.waitpid(self._pid, os.WNOHANG)[0] == 0
        return False

    @property
    def busy(self) -> bool:
        """Whether an app runs.

        Ask now and then, from one thread: the fork server waits when 65,536 ends are not read.
        """
        with suppress(BlockingIOError):
            self._ended += len(os.read(self._ends, 65536))
        return self._started > self._ended


def forget_own_modules() -> None:
    """Forgets what is loaded of this package.

    A ClientApp has to find the code that its app bundle carries.
    """
    package = __name__.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _serve(commands: int, ends: int) -> NoReturn:
    """Forks an app for each line, until the SuperExec ends."""

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                os.write(ends, b".")

    try:
        forget_own_modules()
        gc.freeze()  # a collection in a child would otherwise copy every page
        # A terminal sends it to the whole group, but it is meant for the SuperExec.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, reap)
        with os.fdopen(commands) as lines:
            while line := lines.readline():
                if os.fork() == 0:
                    os.close(ends)
                    _become(json.loads(line))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _become(command: list[str]) -> NoReturn:
    """Runs one app in this process and ends it."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        with suppress(OSError):  # its name in `ps`, where that can be set
            Path("/proc/self/comm").write_text(command[0])
        sys.argv = command
        PROGRAMS[command[0]]()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
