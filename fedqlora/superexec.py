"""Launcher of Flower's SuperExec: authenticated, over TLS, with a fork server for its apps.

    python -m fedqlora.superexec --runtime-api runtime:9094 \
        --root-certificates run/clientapp/ca.crt --secret run/clientapp/secret

A SuperExec asks a SuperLink or a SuperNode for work and starts the ServerApps or ClientApps.
They are forked from a process that has Flower loaded (docs/adr/0006-fork-server.md); all else is
Flower's. When the secret changes, when the certificates change and no app runs, and when the
fork server ends, this process ends with status 75 and the supervisor starts it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from fedqlora.supervised import Beat, ask_for_restart, run_supervised

if TYPE_CHECKING:
    from fedqlora.forkserver import ForkServer

logger = logging.getLogger("fedqlora")

LOOK_SECONDS = 1.0
"""Time between two looks at the credentials, and at whether the fork server lives."""

SHORTEST_SECONDS, LONGEST_SECONDS = 0.2, 1.0
"""Time between two questions for work: what Flower's second would add to every message is for
those who have waited long."""


def choose_pause(waited_seconds: float) -> float:
    """Time until the next question for work, a fiftieth of the time since the last work.

    Measured: asked ten times a second, an idle SuperNode with its SuperExec takes 5 % of a core.
    """
    return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, waited_seconds / 50))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="fedqlora.superexec", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runtime-api", required=True, help="HOST:PORT of the SuperLink or SuperNode to work for"
    )
    parser.add_argument(
        "--root-certificates", type=Path, required=True, help="authority of its certificate"
    )
    parser.add_argument("--secret", type=Path, required=True, help="file with the shared secret")
    parser.add_argument(
        "--beat", type=Path, help="file that is touched whenever the other side has answered"
    )
    return parser.parse_args(arguments)


def _start_apps_in(server: ForkServer) -> None:
    """Makes Flower's executor start its commands in the fork server.

    It has no setting for that, but it calls `subprocess.Popen` through its module's own name
    `subprocess`, which is all that is replaced.
    """
    from flwr.supercore.superexec.executor import subprocess_executor

    vars(subprocess_executor)["subprocess"] = SimpleNamespace(
        Popen=lambda command, **_: server.start(command), DEVNULL=subprocess.DEVNULL
    )


def run_superexec(arguments: argparse.Namespace) -> None:
    """Waits for the credentials, then runs Flower's SuperExec; does not return after that."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    from fedqlora.forkserver import ForkServer

    server = ForkServer()  # before this process has a thread, and its logging, which an app sets up
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    _wait_for((arguments.root_certificates, arguments.secret))
    watched = (arguments.root_certificates, arguments.secret, server)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec import run_superexec as loop

    _start_apps_in(server)
    beat = Beat(arguments.beat)

    def pause(_seconds: float) -> None:
        beat.touch()  # the loop pauses after each answer
        time.sleep(choose_pause(time.monotonic() - server.last_start))

    vars(loop)["time"] = SimpleNamespace(sleep=pause)
    # Flower reads its options from the command line only.
    sys.argv = [
        "flower-superexec",
        f"--runtime-api-address={arguments.runtime_api}",
        f"--root-certificates={arguments.root_certificates}",
        f"--superexec-auth-secret-file={arguments.secret}",
    ]
    run_supervised(flower_superexec, logger)


def _wait_for(files: Sequence[Path]) -> None:
    """Waits for files that the other side writes when it starts."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        logger.warning("Waiting for %s.", ", ".join(map(str, missing)))
    while not all(file.is_file() for file in files):
        time.sleep(0.2)


def _watch(certificates: Path, secret: Path, server: ForkServer) -> None:
    """Ends this process when what it started with no longer holds.

    New certificates wait for the end of an app: an authority's rollover keeps the old ones good
    for longer than a run, and a run is worth more.
    """

    def read(file: Path) -> bytes:
        return file.read_bytes() if file.is_file() else b""

    trusted, shared = read(certificates), read(secret)
    while server.running:
        idle, renewed = not server.busy, read(certificates) != trusted
        if read(secret) != shared or (renewed and idle):
            ask_for_restart("The credentials have changed", logger)
        time.sleep(LOOK_SECONDS)
    ask_for_restart("The fork server has ended", logger)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the SuperExec; ends with status 0 after SIGTERM, otherwise with 75."""
    run_superexec(parse_arguments(arguments))


if __name__ == "__main__":
    main()
