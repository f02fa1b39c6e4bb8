"""The coordinator's folder: its signing key and the roster that it signed."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from certs.files import CertificateError
from certs.roster import Roster, read_roster
from fedqlora.errors import ConfigError
from fedqlora.keys import load_signing_key


def load_roster(coordinator: Path) -> tuple[Ed25519PrivateKey, Roster]:
    """The signing key, and the roster once its signature was checked.

    Raises:
        ConfigError: a file is missing, or the roster is not the coordinator's.
    """
    key = load_signing_key(coordinator / "signing.key")
    try:
        return key, read_roster(coordinator, key.public_key())
    except CertificateError as error:
        raise ConfigError(str(error)) from None
