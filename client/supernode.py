"""Launcher of Flower's SuperNode: client certificate, one-sentence refusals, no silent death.

    python -m client.supernode --keys keys --superlink superlink.example.org:9092 \
        --state state/supernode --clientapp-api runtime:9094 --handover run/clientapp

It reaches out only to the SuperLink; its own SuperExec, which runs the ClientApps elsewhere,
reaches it at `--clientapp-api` with what it finds in the hand-over folder. Before Flower starts,
the key files are checked and the SuperLink is tried once: TLS in both directions, then the
registration of this node's key. A SuperLink that does not answer is waited for. Afterwards
Flower's SuperNode runs until it ends for whatever reason; then this process ends too, with
status 75, and the supervisor (container, demo) starts it again. `client.enrolment` holds the
trial, `client.renewal` follows new certificates, `client.apps` says which apps may run.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client.apps import allow_only
from client.handover import make_handover
from client.policy import load_policy
from fedqlora.address import check_port_is_free, split_address
from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.supervised import Beat, run_supervised
from fedqlora.tls import prepare_grpc, read_key_file

logger = logging.getLogger("client")


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
    parser.add_argument("--state", type=Path, required=True, help="folder for Flower's home")
    parser.add_argument(
        "--clientapp-api", required=True, help="HOST:PORT where the SuperExec reaches this node"
    )
    parser.add_argument(
        "--handover", type=Path, required=True, help="folder for what the SuperExec needs to do so"
    )
    parser.add_argument(
        "--policy", type=Path, help="the site's policy.toml; without it any app may run"
    )
    parser.add_argument(
        "--beat", type=Path, help="file that is touched whenever the SuperLink has answered"
    )
    parser.add_argument(
        "--wait-seconds",
        type=float,
        help="give up when the SuperLink has not answered by then (default: wait for ever)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads the key that Flower signs this node's calls with.

    Raises:
        ConfigError: it is missing or not an unencrypted OpenSSH key on a NIST curve.
    """
    try:
        key = load_ssh_private_key(read_key_file(path.parent, path.name), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not an unencrypted OpenSSH key on a NIST curve: make it with `make certs`."
        )
    return key


def run_supernode(arguments: argparse.Namespace) -> None:
    """Checks, waits for the SuperLink, then runs Flower; does not return once Flower has run.

    Raises:
        ConfigError: a file, a folder, the policy or an address is wrong; nothing was started.
        FederationError: the SuperLink refuses this node, is not who it should be, or did not
            answer within `--wait-seconds`.
    """
    prepare_grpc()
    from fedqlora.credentials import ClientCertificate, ReloadingIdentity

    identities = ReloadingIdentity(arguments.keys, "client")
    identity = identities.follow()
    node_key = identity.folder / "supernode.key"
    key = load_node_key(node_key)
    superlink = split_address(arguments.superlink, "--superlink")
    api_host, api_port = split_address(arguments.clientapp_api, "--clientapp-api")
    check_port_is_free(api_host, api_port, "--clientapp-api")
    approved = () if arguments.policy is None else load_policy(arguments.policy).apps.digests
    try:
        arguments.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"The state folder {arguments.state} cannot be made ({error.strerror}): give its "
            "parent to this user."
        ) from None
    handover = make_handover(arguments.handover, arguments.state, api_host)
    os.environ |= {
        "FLWR_HOME": os.environ.get("FLWR_HOME", str(arguments.state.resolve() / "flwr")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }

    from client.answers import Answers
    from client.enrolment import is_admitted, wait_until_enrolled
    from client.renewal import Renewal

    wait_until_enrolled(superlink, identity, key, arguments.wait_seconds)

    accepts = functools.partial(is_admitted, key)
    certificate = ClientCertificate(identity)
    certificate.install()
    # Flower reads its options from the command line only.
    sys.argv = [
        "flower-supernode",
        "--grpc-rere",
        f"--superlink={arguments.superlink}",
        f"--root-certificates={identity.authority_path}",
        f"--auth-supernode-private-key={node_key}",
        "--isolation=process",
        f"--superexec-auth-secret-file={handover.secret}",
        f"--host={api_host}",
        f"--port={api_port}",
        f"--ssl-certfile={handover.certificate}",
        f"--ssl-keyfile={handover.key}",
        f"--ssl-ca-certfile={handover.certificate}",
    ]
    from flwr.supernode.cli import flower_supernode

    Pauses(Beat(arguments.beat)).install()
    Answers().install()
    if approved:
        allow_only(approved)
    Renewal(identities, certificate, accepts).start()
    run_supervised(flower_supernode, logger)


class Pauses:
    """How long a SuperNode waits between two looks (docs/adr/0005-polling.md).

    Flower looks for an instruction every 3 s and for its ClientApp's reply every 0.5 s. Here
    the wait for an instruction is a tenth of the time waited so far, at least 0.1 s and at most
    Flower's 3 s: short between rounds that follow each other, and an idle site asks no more
    often than before. The reply lies in this process's memory and is looked for every 0.05 s.

    Looking sooner, it finds messages whose content the ServerApp is still sending, which Flower
    asks for again after 1 s, 2 s, 4 s; here after 0.1 s, 0.2 s and so on up to Flower's 10 s.
    """

    SHORTEST_SECONDS = 0.1
    REPLY_SECONDS = 0.05

    def __init__(self, beat: Beat) -> None:
        """Begins to wait.

        Args:
            beat: touched at each pause: Flower pauses only once the SuperLink has answered, or
                while a ClientApp works.
        """
        self._beat = beat
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
            return self.REPLY_SECONDS
        return min(seconds, max(self.SHORTEST_SECONDS, (now - self._since) / 10))

    def install(self) -> None:
        """Make Flower's loop take its pauses from here.

        The loop has no setting, but it sleeps and pulls through its module's own names `time`
        and `pull_objects`, which are all that is replaced.
        """
        from flwr.supernode import start_client_internal

        def pause(seconds: float) -> None:
            self._beat.touch()
            time.sleep(self.choose(seconds, time.monotonic()))

        names = vars(start_client_internal)
        names["time"] = SimpleNamespace(sleep=pause)
        names["pull_objects"] = functools.partial(
            names["pull_objects"], initial_backoff=self.SHORTEST_SECONDS
        )


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
