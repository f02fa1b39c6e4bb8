"""Starts ClientApps by forking a process that has imported what every one of them needs.

Run by path, with one JSON list on a line of stdin for each ClientApp to start: the arguments of
`flwr-clientapp`. Each still is a process of its own. Nothing of ours is imported here: a
ClientApp has to find the code that its app bundle carries, not a copy that is loaded already.
"""

import functools
import json
import os
import signal
import sys
import traceback

import flwr.clientapp  # noqa: F401  imported for the children, as are the next three
import grpc  # noqa: F401
import httpcore  # noqa: F401
import numpy  # noqa: F401
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

# Started at once, a ClientApp finds messages that the SuperNode is still receiving, and Flower
# would look again after 1 s, 2 s, 4 s (docs/adr/0005-polling.md).
pull = "pull_and_inflate_object_from_tree"
vars(run_clientapp)[pull] = functools.partial(vars(run_clientapp)[pull], initial_backoff=0.1)


def become(arguments: list[str]) -> None:
    """Run one ClientApp in this process and end it."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = arguments
        flwr_clientapp()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve until stdin is closed, which the SuperExec's end does."""
    # A script's own folder would offer our modules under the names of others.
    sys.path.pop(0)
    # The kernel reaps the children: nobody waits for them here.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # A terminal sends it to the whole group, but it is meant for the SuperExec.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while line := sys.stdin.readline():
        if os.fork() == 0:
            become(json.loads(line))


if __name__ == "__main__":
    main()
