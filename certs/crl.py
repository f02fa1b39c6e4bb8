"""Certificate revocation lists: which serial numbers no longer count, signed by an authority.

Every sites authority in force signs one list, and all lists name the same serials: a number that
its signer never gave out harms nobody (they are random), and a site that was revoked before a
rollover stays revoked after it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from certs.authority import LEAF_DAYS, Issuer
from certs.certificate import CLOCK_SLACK
from certs.files import CertificateError, read_file

CRL_FILE = "crl.pem"
CRL_DAYS = 30
_END = b"-----END X509 CRL-----\n"


def sign_lists(
    issuers: Sequence[Issuer],
    revoked: Mapping[int, datetime.datetime],
    now: datetime.datetime,
    *,
    number: int = 0,
) -> bytes:
    """Return the lists of all issuers as PEM, each valid for 30 days.

    Args:
        issuers: the sites authorities in force.
        revoked: when each serial was revoked; those of leaves that have ended are left out.
        now: when the 30 days start, with a time zone.
        number: the highest number of the lists before; the new ones have a higher one.
    """
    lists = []
    for issuer in issuers:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.certificate.subject)
            .last_update(now - CLOCK_SLACK)
            .next_update(now + datetime.timedelta(days=CRL_DAYS))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
                critical=False,
            )
            .add_extension(x509.CRLNumber(max(number + 1, int(now.timestamp()))), critical=False)
        )
        for serial, moment in sorted(revoked.items()):
            # A leaf that was issued before this moment has ended since.
            if now - moment <= datetime.timedelta(days=LEAF_DAYS) + CLOCK_SLACK:
                entry = x509.RevokedCertificateBuilder().serial_number(serial)
                builder = builder.add_revoked_certificate(entry.revocation_date(moment).build())
        signed = builder.sign(issuer.key, hashes.SHA256())
        lists.append(signed.public_bytes(serialization.Encoding.PEM))
    return b"".join(lists)


def read_lists(
    path: Path, issuers: Sequence[x509.Certificate]
) -> list[x509.CertificateRevocationList]:
    """Return the lists in a file after checking that these issuers signed them.

    Raises:
        CertificateError: the file is missing, is no list, or one in it has another signer.
    """
    content = read_file(path)
    pieces = [piece + _END for piece in content.split(_END) if piece.strip()]
    try:
        lists = [x509.load_pem_x509_crl(piece) for piece in pieces]
    except ValueError as error:
        raise CertificateError(
            f"{path} does not hold revocation lists; restore it from an earlier version."
        ) from error
    for one in lists:
        if find_issuer(one, issuers) is None:
            raise CertificateError(
                f"{path} holds a revocation list that no sites authority has signed; restore it "
                "from an earlier version."
            )
    if not lists:
        raise CertificateError(
            f"{path} does not hold revocation lists; restore it from an earlier version."
        )
    return lists


def find_issuer(
    one: x509.CertificateRevocationList, issuers: Sequence[x509.Certificate]
) -> x509.Certificate | None:
    """Return the certificate of whoever signed a list, or None if it is nobody of these."""
    for issuer in issuers:
        key = issuer.public_key()
        try:
            # The names of two authorities may be equal; only the signature tells them apart.
            if one.issuer == issuer.subject and one.is_signature_valid(key):  # type: ignore[arg-type]
                return issuer
        except (TypeError, ValueError):
            continue
    return None


def list_revoked(
    lists: Sequence[x509.CertificateRevocationList],
) -> dict[int, datetime.datetime]:
    """Return when each serial on any of the lists was revoked."""
    return {entry.serial_number: entry.revocation_date_utc for one in lists for entry in one}


def read_number(lists: Sequence[x509.CertificateRevocationList]) -> int:
    """Return the highest number of the lists."""
    numbers = [one.extensions.get_extension_for_class(x509.CRLNumber).value for one in lists]
    return max((number.crl_number for number in numbers), default=0)


def name_end(one: x509.CertificateRevocationList) -> datetime.datetime:
    """Return when a list has to be replaced by a newer one; the distant past if it does not say."""
    end = one.next_update_utc
    return datetime.datetime.min.replace(tzinfo=datetime.UTC) if end is None else end
