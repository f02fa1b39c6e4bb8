"""A hospital in a folder of its own: it has what the site kit brings, and nothing of the centre."""

from __future__ import annotations

import shutil
from pathlib import Path

from certs.acceptance import Accepted, accept_reply
from certs.application import Application, make_request, renew_request
from certs.request import Request
from certs.signing import Signed, sign_request


def give_trust(out: Path, trust: Path) -> Path:
    """Copy what a kit brings out of the folder of all parties."""
    trust.mkdir(parents=True, exist_ok=True)
    for name in ("root.crt", "coordinator.pub"):
        shutil.copy2(out / "superlink" / "current" / name, trust / name)
    return trust


def confirm(_request: Request) -> None:
    """The two have compared the fingerprint."""


def apply(out: Path, home: Path, site: str = "h") -> Application:
    """Make a site's keys and its request."""
    return make_request(home, site, give_trust(out, home.with_name(f"{home.name}-trust")))


def enrol(out: Path, home: Path, site: str = "h") -> Accepted:
    """Bring a site from its request to working keys."""
    return accept_reply(home, sign_request(out, apply(out, home, site).path, confirm).reply)


def renew(out: Path, home: Path, site: str = "h") -> Signed:
    """Sign a request to renew, whose reply the site has not got yet."""
    return sign_request(out, renew_request(home, site).path, confirm)
