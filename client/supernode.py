"""Launcher of Flower's SuperNode: client certificate, one-sentence refusals, no silent death.

    python -m client.supernode --keys keys --superlink superlink.example.org:9092 \
        --trainer-socket run/trainer.sock --state state/supernode

It makes outbound connections only. Before Flower starts, the key files are checked and the
SuperLink is tried once: TLS in both directions, then the registration of this node's key. A
SuperLink that does not answer is waited for. Afterwards Flower's SuperNode runs until it ends
for whatever reason; then this process ends too, with status 75, and the supervisor (container,
demo) starts it again. `client.enrolment` holds the trial.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from fedqlora.address import check_port_is_free, find_free_port, split_address
from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.tls import Identity, load_identity, prepare_grpc, read_key_file

logger = logging.getLogger("client")

POLL_SECONDS = 0.5
"""Time between two looks for a message; 50 sites then ask the SuperLink 100 times a second."""

RESTART_STATUS = 75
"""Exit status that asks the supervisor for a restart (EX_TEMPFAIL of sysexits.h)."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="client.supernode", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--keys",
        type=Path,
        required=True,
        help="folder with client.key, client.crt, ca.crt and supernode.key, or a `current` link",
    )
    parser.add_argument(
        "--superlink", required=True, help="HOST:PORT of the coordinator's Fleet API"
    )
    parser.add_argument(
        "--trainer-socket", type=Path, required=True, help="unix socket of this site's trainer"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder for Flower's home")
    parser.add_argument(
        "--isolation",
        choices=["subprocess", "process"],
        default="subprocess",
        help="process: ClientApps run under a flower-superexec of their own (containers)",
    )
    parser.add_argument(
        "--clientapp-api",
        help="HOST:PORT where ClientApps reach this node (default: a free loopback port)",
    )
    parser.add_argument(
        "--wait-seconds",
        type=float,
        help="give up when the SuperLink has not answered by then (default: wait for ever)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def check_node_key(identity: Identity) -> Path:
    """Checks that `supernode.key` is what Flower signs with, and returns its path.

    Raises:
        ConfigError: it is missing or not an unencrypted OpenSSH key on a NIST curve.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(read_key_file(identity.folder, "supernode.key"), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    path = identity.folder / "supernode.key"
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not an unencrypted OpenSSH key on a NIST curve: make it with `make certs`."
        )
    return path


def run_supernode(arguments: argparse.Namespace) -> None:
    """Checks, waits for the SuperLink, then runs Flower; does not return once Flower has run.

    Raises:
        ConfigError: a file, a folder or an address is wrong; nothing was started.
        FederationError: the SuperLink refuses this node, is not who it should be, or did not
            answer within `--wait-seconds`.
    """
    prepare_grpc()
    identity = load_identity(arguments.keys, "client")
    node_key = check_node_key(identity)
    superlink = split_address(arguments.superlink, "--superlink")
    if arguments.clientapp_api is None and arguments.isolation == "process":
        raise ConfigError(
            "--isolation process needs --clientapp-api HOST:PORT, where the ClientApp's "
            "flower-superexec reaches this node."
        )
    api = arguments.clientapp_api or f"127.0.0.1:{find_free_port()}"
    api_host, api_port = split_address(api, "--clientapp-api")
    check_port_is_free(api_host, api_port, "--clientapp-api")
    try:
        arguments.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"The state folder {arguments.state} cannot be made ({error.strerror}): give its "
            "parent to this user."
        ) from None
    _set_environment(arguments)

    from client.enrolment import wait_until_enrolled

    wait_until_enrolled(superlink, identity, node_key, arguments.wait_seconds)

    from fedqlora.credentials import present_client_certificate

    present_client_certificate(identity)
    # Flower reads its options from the command line only.
    sys.argv = [
        "flower-supernode",
        "--grpc-rere",
        f"--superlink={arguments.superlink}",
        f"--root-certificates={identity.authority_path}",
        f"--auth-supernode-private-key={node_key}",
        f"--isolation={arguments.isolation}",
        f"--host={api_host}",
        f"--port={api_port}",
    ]
    _run_flower()


def _set_environment(arguments: argparse.Namespace) -> None:
    """What Flower and the ClientApps that it starts find in their environment."""
    os.environ |= {
        "FEDQLORA_TRAINER_SOCKET": str(arguments.trainer_socket.resolve()),
        "FLWR_HOME": os.environ.get("FLWR_HOME", str(arguments.state.resolve() / "flwr")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # How often the SuperExec asks for work; Flower's second would be added to every message.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get(
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2"
        ),
        # Flower starts its helpers by bare name, also where no virtual environment is active.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def ask_more_often() -> None:
    """Shortens the 3 s between a SuperNode's looks for a message (docs/adr/0005-polling.md).

    The slowest site's wait is every round's. The loop has no setting, but it takes its pauses
    from the module's own name `time`, which is all that is replaced.
    """
    from flwr.supernode import start_client_internal

    def pause(seconds: float) -> None:
        time.sleep(min(seconds, POLL_SECONDS))

    vars(start_client_internal)["time"] = SimpleNamespace(sleep=pause)


def _run_flower() -> None:
    """Runs Flower's SuperNode and ends the process: status 0 after SIGTERM, otherwise 75.

    Flower's connection errors that speak of TLS end its worker but not its threads, an evicted
    node sends itself SIGINT and exits with 0, and both look healthy from outside. So every end
    but a SIGTERM is a fault, and `os._exit` leaves no thread behind.
    """
    from flwr.supernode.cli import flower_supernode

    ask_more_often()
    signals, written = os.pipe()
    os.set_blocking(signals, False)
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    try:
        flower_supernode()
    except SystemExit as end:
        logger.warning("Flower's SuperNode ended (status %s).", end.code)
    except BaseException:
        logger.exception("Flower's SuperNode failed.")
    try:
        stopped = signal.SIGTERM in os.read(signals, 4096)
    except BlockingIOError:
        stopped = False
    if not stopped:
        logger.warning("Leaving with status %d, to be started again.", RESTART_STATUS)
    logging.shutdown()
    os._exit(0 if stopped else RESTART_STATUS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the SuperNode; ends with one sentence and a non-zero status on a known problem."""
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("fedqlora", "client"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    try:
        run_supernode(options)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"client.supernode: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
