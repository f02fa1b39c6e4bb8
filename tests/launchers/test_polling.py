"""The pauses of a SuperNode: which are chosen, and that Flower still takes them from there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from client.supernode import Pauses
from fedqlora.supervised import Beat

ROOT = Path(__file__).parents[2]

PROGRAM = """
import inspect
from flwr.supernode import start_client_internal as module
from client.supernode import Pauses
from fedqlora.supervised import Beat
print(inspect.getsource(module))
pauses = Pauses(Beat(None))
pauses.choose = lambda seconds, now: print("asked for", seconds) or 0.0
pauses.install()
module.time.sleep(3)
"""


def test_flowers_loop_takes_its_pauses_from_the_name_that_is_replaced() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    source, _, asked = result.stdout.rpartition("asked for ")
    assert asked.strip() == "3"
    used = set(re.findall(r"\btime\.(\w+)\(", source))
    assert used == {"sleep"}, "Flower's module uses more of `time` than is replaced"
    pauses = {float(text) for text in re.findall(r"\btime\.sleep\(([\d.]+)\)", source)}
    assert pauses == {3, 0.5}, "Flower's pauses have changed: look at Pauses again"


def test_the_wait_for_an_instruction_grows_with_the_time_waited_up_to_flowers_own() -> None:
    pauses = Pauses(Beat(None))
    chosen = [pauses.choose(3, now) for now in (100.0, 100.5, 110.0, 125.0, 190.0)]
    assert chosen == [0.1, 0.1, 1.0, 2.5, 3.0]


def test_a_message_makes_the_next_wait_short_again() -> None:
    pauses = Pauses(Beat(None))
    assert pauses.choose(3, 0.0) == 0.1
    assert pauses.choose(3, 60.0) == 3
    assert pauses.choose(0.5, 61.0) == 0.05
    assert pauses.choose(3, 90.0) == 0.1
