"""The service that trainer and evaluator share, as a process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Whatever the handler of the first signal does, another signal comes at that moment.
SERVE = """
import signal, sys
from pathlib import Path
from fedqlora.engine import service
from fedqlora.protocol_pb2_grpc import TrainerServicer

def interrupt(frame, event, argument):
    handlers = 0
    while frame is not None:
        here = frame.f_code
        handlers += here.co_name == "<lambda>" and here.co_filename == service.__file__
        frame = frame.f_back
    if handlers == 1:
        print("again", flush=True)
        signal.raise_signal(signal.SIGTERM)

sys.setprofile(interrupt)
service.serve(TrainerServicer(), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_program_that_is_told_to_stop_while_it_is_being_told_stops(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(socket)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "again" in printed
