"""What our launchers owe their supervisor: an honest exit status, and a beat while connected.

The supervisor (a container engine, the demo) starts a process again that ends with status 75,
and calls it healthy while its beat is fresh.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

RESTART_STATUS = 75
"""Exit status that asks the supervisor for a restart (EX_TEMPFAIL of sysexits.h)."""


class Beat:
    """A file whose time of change says when the other side last answered.

    Args:
        path: the file; None beats nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def touch(self) -> None:
        """Say that the other side has answered just now."""
        if self._path is not None:
            self._path.touch()


def run_supervised(flower: Callable[[], None], logger: logging.Logger) -> NoReturn:
    """Runs one of Flower's programs and ends the process: 0 after SIGTERM, otherwise 75.

    Flower's connection errors that speak of TLS end its worker but not its threads, an evicted
    node sends itself SIGINT and exits with 0, and both look healthy from outside. So every end
    but a SIGTERM is a fault, and `os._exit` leaves no thread behind.
    """
    signals, written = os.pipe()
    os.set_blocking(signals, False)
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    try:
        flower()
    except SystemExit as end:
        logger.warning("Flower's program ended (status %s).", end.code)
    except BaseException:
        logger.exception("Flower's program failed.")
    try:
        stopped = signal.SIGTERM in os.read(signals, 4096)
    except BlockingIOError:
        stopped = False
    if stopped:
        logging.shutdown()
        os._exit(0)
    ask_for_restart("It was not asked to end", logger)


def ask_for_restart(reason: str, logger: logging.Logger) -> NoReturn:
    """Ends this process at once with status 75, from any thread."""
    logger.warning("%s: leaving with status %d, to be started again.", reason, RESTART_STATUS)
    logging.shutdown()
    os._exit(RESTART_STATUS)
