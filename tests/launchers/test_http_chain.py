"""The chain that the Control and Runtime APIs send while an authority is rolled over."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from certs.rollover import STAGES, roll_over
from certs.rotation import rotate
from certs.site import make_all
from fedqlora.credentials import ReloadingIdentity
from server.superlink import serve_http_from


def shake_hands(server: ssl.SSLContext, root: str) -> None:
    """A whole handshake in memory; raises where the client does not trust the server."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.create_default_context(cadata=root)
    client = trusting.wrap_bio(to_client, to_server, server_hostname="localhost")
    steps: list[Callable[[], None]] = [
        client.do_handshake,
        server.wrap_bio(to_server, to_client, server_side=True).do_handshake,
    ]
    while steps:
        step = steps.pop(0)
        try:
            step()
        except ssl.SSLWantReadError:
            steps.append(step)


def test_who_trusts_the_old_root_is_served_although_nobody_connected_during_the_rollover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make_all(out, ["a"])
    root = (out / "superlink" / "current" / "root.crt").read_text()
    given: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda **options: given.update(options))
    identities = ReloadingIdentity(out / "superlink")
    serve_http_from(identities)
    uvicorn.run()
    context = given["ssl_context_factory"]()
    shake_hands(context, root)
    for _ in STAGES:
        roll_over(out)
        identities.follow()  # as its thread does, whether somebody connects or not
    shake_hands(context, root)
    rotate(out)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, root)
