"""Signals that end the demo: turned into an exception, so that `with` blocks clean up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """SIGTERM and SIGHUP end the main thread like Ctrl-C does; nothing interrupts the clean-up."""

    _numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self._before: dict[signal.Signals, _Handler] = {}

    def catch(self) -> None:
        """From now on SIGTERM and SIGHUP raise `SystemExit`; no effect outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self._numbers}
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, _leave)

    def ignore(self) -> None:
        """From now on none of them interrupts what is being done."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def release(self) -> None:
        """Puts back what was there before `catch`; safe to call twice."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _leave(number: int, _frame: FrameType | None) -> None:
    """Ends the program with the status that a shell reports for this signal."""
    raise SystemExit(128 + number)
