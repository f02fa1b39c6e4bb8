"""Launcher of Flower's SuperExec: authenticated, over TLS, with a fork server for ClientApps.

    python -m fedqlora.superexec --runtime-api runtime:9094 \
        --root-certificates run/clientapp/ca.crt --secret run/clientapp/secret

A SuperExec asks a SuperLink or a SuperNode for work and starts the ServerApps or ClientApps.
ClientApps are forked from a process that has Flower loaded (docs/adr/0006-fork-server.md); all
else is Flower's. When the secret changes, when the certificates change and no ServerApp runs,
and when the fork server ends, this process ends with status 75 and the supervisor starts it
again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from fedqlora.supervised import Beat, ask_for_restart, run_supervised

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


class Starter:
    """Starts apps: ClientApps out of the fork server (fedqlora/forkserver.py), others anew."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("forkserver.py")
        self._others: list[subprocess.Popen[bytes]] = []
        self.last_start = time.monotonic()
        """When an app was started last, or this program; a monotonic clock, in seconds."""
        self._process = subprocess.Popen(  # noqa: S603  our own file, no input of anybody
            [sys.executable, str(program)], stdin=subprocess.PIPE, text=True
        )

    @property
    def running(self) -> bool:
        """Whether ClientApps can be started."""
        return self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether an app runs that was not forked: a ServerApp, which would end with us."""
        return any(process.poll() is None for process in self._others)

    def install(self) -> None:
        """Make Flower's executor start its commands here.

        It has no setting for that, but it calls `subprocess.Popen` through its module's own
        name `subprocess`, which is all that is replaced.
        """
        from flwr.supercore.superexec.executor import subprocess_executor

        def start(command: list[str], **options: int) -> None:
            self.last_start = time.monotonic()
            if command[0] != "flwr-clientapp":
                self._others = [process for process in self._others if process.poll() is None]
                started = subprocess.Popen(command, **options)  # type: ignore[call-overload]  # noqa: S603
                self._others.append(started)
                return
            assert self._process.stdin is not None  # noqa: S101  a pipe was asked for
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

        vars(subprocess_executor)["subprocess"] = SimpleNamespace(
            Popen=start, DEVNULL=subprocess.DEVNULL
        )


def run_superexec(arguments: argparse.Namespace) -> None:
    """Waits for the credentials, then runs Flower's SuperExec; does not return after that."""
    _wait_for((arguments.root_certificates, arguments.secret))
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower starts its programs by bare name, also where no virtual environment is active.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    starter = Starter()
    watched = (arguments.root_certificates, arguments.secret, starter)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec import run_superexec as loop

    starter.install()
    beat = Beat(arguments.beat)

    def pause(_seconds: float) -> None:
        beat.touch()  # the loop pauses after each answer
        time.sleep(choose_pause(time.monotonic() - starter.last_start))

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


def _watch(certificates: Path, secret: Path, starter: Starter) -> None:
    """Ends this process when what it started with no longer holds.

    New certificates wait for the end of a ServerApp: an authority's rollover keeps the old ones
    good for longer than a run, and a run is worth more.
    """

    def read(file: Path) -> bytes:
        return file.read_bytes() if file.is_file() else b""

    trusted, shared = read(certificates), read(secret)
    while starter.running:
        renewed = read(certificates) != trusted
        if read(secret) != shared or (renewed and not starter.busy):
            ask_for_restart("The credentials have changed", logger)
        time.sleep(LOOK_SECONDS)
    ask_for_restart("The fork server has ended", logger)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the SuperExec; ends with status 0 after SIGTERM, otherwise with 75."""
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    run_superexec(options)


if __name__ == "__main__":
    main()
