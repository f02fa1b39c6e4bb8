"""One run of a Flower app: submitted, its output followed, its end waited for.

Flower discards what a ServerApp prints and keeps a copy in the SuperLink, so the output is
streamed from there; both the stream and the wait survive a SuperLink that is away for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedqlora.errors import FederationError
from server.control import ControlClient

POLL_SECONDS = 1.0
"""Time between two looks at a run's state."""

_LAST_WORDS_SECONDS = 10.0  # the SuperLink sends the rest of the output within a poll of its own


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended."""

    run_id: int
    """Flower's id of the run."""
    outcome: str
    """`completed`, `failed` or `stopped`."""
    details: str
    """Flower's reason for a failure, may be empty."""
    log: str
    """What the ServerApp printed."""

    @property
    def completed(self) -> bool:
        """Whether the ServerApp ended without an error."""
        return self.outcome == "completed"


def wait_for_run(
    connect: Callable[[], ControlClient],
    run_id: int,
    log: Path,
    *,
    timeout_seconds: float,
    echo: Callable[[str], None] | None = None,
) -> RunResult:
    """Waits for a run to end.

    Args:
        connect: makes a client of the Control API.
        run_id: Flower's id of the run.
        log: file that gets the ServerApp's output as it comes.
        timeout_seconds: how long it may take.
        echo: called with each line of the output, on another thread.

    Raises:
        FederationError: the run did not end in time.
    """
    output = _Output(connect, run_id, log, echo)
    output.start()
    try:
        deadline = time.monotonic() + timeout_seconds
        while True:
            with connect() as control:
                state = control.read_run(run_id)
            if state is not None and not state.active:
                output.join(_LAST_WORDS_SECONDS)
                return RunResult(
                    run_id=run_id,
                    outcome=state.outcome,
                    details=state.details,
                    log=log.read_text(encoding="utf-8"),
                )
            if time.monotonic() > deadline:
                raise FederationError(
                    f"Run {run_id} did not end within {timeout_seconds:.0f} seconds: see {log} and "
                    "the other logs beside it."
                )
            time.sleep(POLL_SECONDS)
    finally:
        output.end()


class _Output(threading.Thread):
    """Copies a ServerApp's output into a file, line by line."""

    def __init__(
        self,
        connect: Callable[[], ControlClient],
        run_id: int,
        log: Path,
        echo: Callable[[str], None] | None,
    ) -> None:
        super().__init__(name=f"output-{run_id}", daemon=True)
        self._connect, self._run_id, self._log = connect, run_id, log
        self._echo = echo or (lambda _line: None)
        self._ended = threading.Event()
        log.write_text("", encoding="utf-8")

    def end(self) -> None:
        """Lets the thread end at the next piece of output."""
        self._ended.set()

    def run(self) -> None:
        newest, rest = 0.0, ""
        while not self._ended.is_set():
            with self._connect() as control, self._log.open("a", encoding="utf-8") as log:
                for text, time_stamp in control.stream_output(self._run_id, newest):
                    newest = time_stamp
                    log.write(text)
                    log.flush()
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        self._echo(line)
                    if self._ended.is_set():
                        return
                try:
                    state = control.read_run(self._run_id)
                except FederationError:
                    break  # the SuperLink has lost the run, which the main thread says
            if state is not None and not state.active:
                break
            self._ended.wait(POLL_SECONDS)
        if rest:
            self._echo(rest)
