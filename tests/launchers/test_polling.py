"""The one pause of Flower's that is shortened, and that Flower still takes it from there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import inspect, time
from flwr.supernode import start_client_internal as module
from client.supernode import ask_more_often
print(inspect.getsource(module))
ask_more_often()
started = time.monotonic()
module.time.sleep(3)
print("slept", time.monotonic() - started)
"""


def test_flowers_loop_takes_its_pauses_from_the_name_that_is_replaced() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    source, _, slept = result.stdout.rpartition("slept ")
    used = set(re.findall(r"\btime\.(\w+)\(", source))
    assert used == {"sleep"}, "Flower's module uses more of `time` than is replaced"
    assert "time.sleep(3)" in source, "the pause that is shortened is gone: drop ask_more_often"
    assert float(slept) < 3
