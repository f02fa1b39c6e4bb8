"""Whether a certificate chain is one that the other side accepts: anchors, purpose, names."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from certs.names import SITE_URI, list_names


def accept_server(
    chain: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    now: datetime.datetime,
) -> bool:
    """Tell whether a client on the same machine that trusts `anchors` accepts `chain`.

    Args:
        chain: the leaf, then what issued it.
        anchors: what the client trusts.
        now: the moment to check for, with a time zone.
    """
    builder = PolicyBuilder().store(Store(list(anchors))).time(now)
    verifier = builder.build_server_verifier(x509.DNSName("localhost"))
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except VerificationError:
        return False
    return True


def accept_client(
    chain: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    site: str,
    now: datetime.datetime,
) -> bool:
    """Tell whether a server that trusts `anchors` accepts `chain`, and for this site only.

    Args:
        chain: the leaf, then what issued it.
        anchors: what the server trusts.
        site: the name that the leaf has to carry.
        now: the moment to check for, with a time zone.
    """
    verifier = PolicyBuilder().store(Store(list(anchors))).time(now).build_client_verifier()
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except VerificationError:
        return False
    return list_names(chain[0]) == [f"{SITE_URI}{site}"]


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Tell whether `issuer` signed `certificate` and its name is the one given there."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fits(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    """Tell whether a certificate is about this key."""
    return key.public_key() == certificate.public_key()


def name_issuer(certificate: x509.Certificate) -> str:
    """Return the common name of a certificate's issuer, or all of its name without one."""
    return _name(certificate.issuer)


def name_subject(certificate: x509.Certificate) -> str:
    """Return the common name of a certificate's subject, or all of its name without one."""
    return _name(certificate.subject)


def _name(name: x509.Name) -> str:
    for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME):
        return str(attribute.value)
    return name.rfc4514_string()
