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
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1"
        ),
        # Flower starts its helpers by bare name, also where no virtual environment is active.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


class Pauses:
    """How long a SuperNode waits between two looks (docs/adr/0005-polling.md).

    Flower looks for an instruction every 3 s and for its ClientApp's reply every 0.5 s. Here
    the wait for an instruction is a tenth of the time waited so far, at least 0.1 s and at most
    Flower's 3 s: short between rounds that follow each other, and an idle site asks no more
    often than before. The reply comes from this machine, so it is looked for every 0.1 s.
    """

    SHORTEST_SECONDS = 0.1

    def __init__(self) -> None:
        self._asked = 0.0
        self._since = 0.0

    def choose(self, seconds: float, now: float) -> float:
        """The pause to take, in seconds.

        Args:
            seconds: the pause that Flower asks for; another one than before means that what
                was waited for has come.
            now: a monotonic clock, in seconds.
        """
        if seconds != self._asked:
            self._asked, self._since = seconds, now
        if seconds < 1:
            return self.SHORTEST_SECONDS
        return min(seconds, max(self.SHORTEST_SECONDS, (now - self._since) / 10))

    def install(self) -> None:
        """Make Flower's loop take its pauses from here.

        The loop has no setting, but it sleeps through its module's own name `time`, which is
        all that is replaced.
        """
        from flwr.supernode import start_client_internal

        def pause(seconds: float) -> None:
            time.sleep(self.choose(seconds, time.monotonic()))

        vars(start_client_internal)["time"] = SimpleNamespace(sleep=pause)


def _run_flower() -> None:
    """Runs Flower's SuperNode and ends the process: status 0 after SIGTERM, otherwise 75.

    Flower's connection errors that speak of TLS end its worker but not its threads, an evicted
    node sends itself SIGINT and exits with 0, and both look healthy from outside. So every end
    but a SIGTERM is a fault, and `os._exit` leaves no thread behind.
    """
    from flwr.supernode.cli import flower_supernode

    Pauses().install()
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
