"""The trainer: the only process of a site that sees its records.

It has no network: instructions come and replies leave through one unix socket.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from pathlib import Path

from client.core_files import forbid_core_files
from client.peers import load_peers
from client.policy import load_policy
from client.worker import SiteWorker
from fedqlora import VERSION
from fedqlora.audit import AuditLog
from fedqlora.engine.device import add_device_options, open_devices
from fedqlora.engine.service import Identity, Service, serve
from fedqlora.engine.warm import WarmModel
from fedqlora.errors import FedqloraError

log = logging.getLogger("client")

SIGN_SECONDS = 12 * 3600.0
"""Time between two signatures of the audit log's head while nothing else signs it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a site's trainer until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m client.trainer", description=__doc__)
    parser.add_argument("--site", required=True, help="the site's name")
    parser.add_argument("--data", required=True, type=Path, help="file or folder of records")
    parser.add_argument("--models", required=True, type=Path, help="folder of base models")
    parser.add_argument("--policy", required=True, type=Path, help="the site's policy.toml")
    parser.add_argument(
        "--keys",
        required=True,
        type=Path,
        help="folder with signing.key, coordinator.pub and the roster",
    )
    parser.add_argument(
        "--state",
        required=True,
        type=Path,
        help="replay window, audit log, feedback, control variate, metrics",
    )
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to serve on")
    add_device_options(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    forbid_core_files()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        identity = Identity.load(options.site, options.keys)
        policy = load_policy(options.policy)
        peers = load_peers(policy, options.keys, options.site)
        if policy.peers:
            log.info("pinned peers in the roster: %s", ", ".join(sorted(peers)) or "none")
        audit = AuditLog(options.state / "audit.jsonl", identity.key)
        worker = SiteWorker(
            site=options.site,
            data=options.data,
            models=options.models,
            state=options.state,
            policy=policy,
            peers=peers,
            key=identity.key,
            audit=audit,
            warm=WarmModel(*open_devices(options)),
        )
        audit.append("started", release=VERSION)
        audit.sign_head()
        threading.Thread(
            target=audit.keep_signed, args=(threading.Event(), SIGN_SECONDS), daemon=True
        ).start()
        service = Service(identity, options.state / "window", worker, audit=audit)
        serve(service, options.socket)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"trainer {options.site}: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
