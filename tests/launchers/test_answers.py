"""A SuperNode's answers: a run that was stopped does not make every later reply a message late."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Flower's own loop steps over its own state; the SuperLink's side is two plain functions.
PROGRAM = """
import json, sys
from flwr.app import Message, RecordDict
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory
from client.answers import Answers

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
if sys.argv[1] == "mended":
    Answers().install()
objects = ObjectStoreFactory()
store, state = objects.store(), NodeStateFactory(objectstore_factory=objects).state()
sent = []

def message(number):
    made = Message(RecordDict(), 1, "query")
    made.metadata.__dict__["_message_id"] = number
    made.metadata.__dict__["_run_id"] = 7
    return made

def answer(asked):
    reply = Message(RecordDict(), reply_to=asked)
    loop._insert_message(reply, state, store)

def send(reply, tree, seconds):
    sent.append(reply.metadata.reply_to_message_id)
    return set(), ""

def pull(asked):
    # What follows the receipt does not matter here: an unknown run ends the step with an error.
    try:
        loop._pull_and_store_message(
            state=state, object_store=store, node_config={}, receive=lambda: (asked, None),
            get_run=None, get_fab=None, pull_object=None, confirm_message_received=None,
            trusted_entities=None)
    except TypeError:
        pass

stopped, current = message("stopped"), message("current")
pull(stopped)      # its run is stopped, and it is forgotten, but its ClientApp goes on:
answer(stopped)
pull(current)
state.get_message_processing_duration = lambda message_id: 0.0
late = lambda seconds: answer(current)   # comes while the loop waits
loop.time = type("time", (), {"sleep": staticmethod(late)})
loop._push_messages(state=state, object_store=store, send=send, push_object=None)
print(json.dumps(sent))
"""


def replies(how: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_flowers_own_loop_goes_on_with_the_reply_to_a_message_of_a_stopped_run() -> None:
    assert replies("as it is") == ["stopped"], "Flower has mended it: remove client/answers.py"


def test_the_loop_waits_for_the_reply_to_the_message_at_hand() -> None:
    assert replies("mended") == ["stopped", "current"]
