"""Launcher of Flower's SuperLink: mutual TLS, renewed certificates, SQLite state, no phoning home.

    python -m server.superlink --certs certs/out/superlink --state state/superlink

Two listeners. The Fleet API (gRPC, `--fleet`) is what sites reach: TLS 1.3 only, a client
certificate from our authority is required, and each SuperNode signs with a registered key. Every
call is checked against the roster and the revocation lists of that moment (`server.admission`).
The Control and Runtime APIs (HTTPS, `--control`) start runs and serve the ServerApp: Flower
gives them no login, so they stay on loopback or an admin network; they use the same
certificate, which therefore must name that address too.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import logging
import os
import secrets
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedqlora.address import check_port_is_free, split_address
from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.files import write_durably
from fedqlora.tls import Identity, prepare_grpc

if TYPE_CHECKING:
    from fedqlora.credentials import ReloadingIdentity

logger = logging.getLogger("server")

SECRET_BYTES = 32
SHUTDOWN_SECONDS = 5
LOOK_SECONDS = 2.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="server.superlink", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--certs",
        type=Path,
        required=True,
        help="folder with server.key, server.crt (chain), ca.crt, root.crt, crl.pem, "
        "coordinator.pub and the signed roster, or a `current` link",
    )
    parser.add_argument(
        "--state", type=Path, required=True, help="folder for the database and Flower's home"
    )
    parser.add_argument(
        "--fleet", default="0.0.0.0:9092", help="HOST:PORT of the Fleet API (default %(default)s)"
    )
    parser.add_argument(
        "--control",
        default="127.0.0.1:8000",
        help="HOST:PORT of the Control and Runtime APIs; they have no login (default %(default)s)",
    )
    parser.add_argument(
        "--superexec-secret",
        type=Path,
        help="file shared with the SuperExec, made if missing (default: STATE/superexec.secret)",
    )
    parser.add_argument(
        "--metrics",
        help="HOST:PORT that serves Prometheus metrics without a login (default: none)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def prepare_state(folder: Path) -> Path:
    """Makes the state folder and returns the path of the database in it.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigError(
            f"The state folder {folder} cannot be written ({error.strerror}): give it to this user."
        ) from None
    return folder.resolve() / "superlink.sqlite"


def prepare_secret(path: Path) -> Path:
    """Makes the secret that the SuperExec signs with, unless it is there.

    It stays the same over restarts: a SuperExec with a running ServerApp waits meanwhile.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, secrets.token_bytes(SECRET_BYTES), 0o600)
    except OSError as error:
        raise ConfigError(
            f"The secret {path} cannot be written ({error.strerror}): give its folder to this user."
        ) from None
    return path


def serve_http_from(identities: ReloadingIdentity) -> None:
    """Makes the Control and Runtime APIs follow renewals and speak TLS 1.3 only.

    Flower hands uvicorn file names that are read once; uvicorn's `ssl_context_factory` and the
    server-name callback, which runs in every handshake, make it the reloading identity's.
    """
    import uvicorn

    def make_context(identity: Identity) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(identity.chain_path, identity.key_path)
        return context

    served = identities.follow()
    first = newest = make_context(served)

    def renew(current: Identity) -> None:
        nonlocal served, newest
        # The same leaf in a shorter chain is an authority that was retired. A ServerApp goes
        # on trusting what it started with: the chain that leads it here stays until the leaf
        # goes, or a run would be lost. Sites, on the Fleet API, get the shorter one.
        if current.leaf != served.leaf:
            newest = make_context(current)
        served = current

    def use_newest(connection: ssl.SSLObject, _name: str | None, _first: object) -> None:
        identities.follow()
        connection.context = newest

    # Not at the next handshake: between a new leaf and the end of its old authority there may be
    # none, where a ServerApp keeps its connection.
    identities.on_change(renew)

    first.set_servername_callback(use_newest)  # type: ignore[arg-type]  # asyncio: SSLObject only
    uvicorn.run = functools.partial(
        uvicorn.run,
        ssl_context_factory=lambda *_: first,
        # Whoever follows a run holds a connection for hours: an end does not wait for that.
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def run_superlink(arguments: argparse.Namespace) -> None:
    """Checks everything that can be checked, then hands over to Flower; returns when it stops.

    Raises:
        ConfigError: a file, a folder or an address is wrong; nothing was started.
    """
    prepare_grpc()
    from fedqlora.credentials import ReloadingIdentity, serve_mutual_tls
    from server.admission import Admission
    from server.exporter import SuperLinkMetrics, serve_metrics

    identities = ReloadingIdentity(arguments.certs)
    good = identities.follow()
    admission = Admission(arguments.certs)
    fleet_host, fleet_port = split_address(arguments.fleet, "--fleet")
    control_host, control_port = split_address(arguments.control, "--control")
    check_port_is_free(fleet_host, fleet_port, "--fleet")
    check_port_is_free(control_host, control_port, "--control")
    if arguments.metrics:
        check_port_is_free(*split_address(arguments.metrics, "--metrics"), "--metrics")
    database = prepare_state(arguments.state)
    secret = prepare_secret(arguments.superexec_secret or database.parent / "superexec.secret")
    if control_host != "localhost" and not _is_loopback(control_host):
        logger.warning(
            "The Control API on %s has no login: whoever reaches it starts code on every site.",
            arguments.control,
        )
    os.environ |= {
        "FLWR_HOME": os.environ.get("FLWR_HOME", str(database.parent / "flwr")),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    from flwr.superlink.cli import flower_superlink

    serve_mutual_tls(identities)
    admission.install()
    serve_http_from(identities)
    # Handshakes ask too, but sites that stay connected make none.
    identities.keep_following(LOOK_SECONDS)
    if arguments.metrics:
        serve_metrics(SuperLinkMetrics(identities, admission), arguments.metrics)
    logger.info(
        "Certificate with serial %s, valid until %s UTC.",
        good.serial,
        f"{good.leaf.not_valid_after_utc:%Y-%m-%d %H:%M}",
    )
    # Flower reads its options from the command line only.
    sys.argv = [
        "flower-superlink",
        "--fleet-api-type=grpc-rere",
        f"--fleet-api-address={arguments.fleet}",
        f"--host={control_host}",
        f"--port={control_port}",
        f"--ssl-keyfile={good.key_path}",
        f"--ssl-certfile={good.chain_path}",
        f"--ssl-ca-certfile={good.authority_path}",
        "--enable-supernode-auth",
        "--isolation=process",
        f"--superexec-auth-secret-file={secret}",
        f"--database={database}",
        "--disable-runtime-dependency-installation",
    ]
    flower_superlink()


def _is_loopback(host: str) -> bool:
    """Whether a literal address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the SuperLink; ends with one sentence and a non-zero status on a known problem."""
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("fedqlora", "server"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    try:
        run_superlink(options)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"server.superlink: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
