"""Names of sites and hosts: which are allowed, and how a certificate carries them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509

from certs.files import MisuseError

SITE_URI = "urn:fedqlora:site:"
RESERVED_NAMES = ("evaluator", "coordinator", "superlink", "authority")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "superlink")
_SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def check_sites(sites: Sequence[str]) -> None:
    """Refuse a list that cannot be the sites of a federation.

    Raises:
        MisuseError: the list is empty, or a name in it is malformed, reserved or there twice.
    """
    if not sites:
        raise MisuseError("No site is named; name at least one, such as --sites a,b,c.")
    for site in sites:
        if not _SITE_NAME.fullmatch(site):
            raise MisuseError(
                f"{site!r} cannot name a site; use 1 to 32 of a-z, 0-9 and -, not - first."
            )
        if site in RESERVED_NAMES:
            raise MisuseError(f"{site!r} is the name of a part of the centre; rename the site.")
    if len(set(sites)) != len(sites):
        raise MisuseError("A site is named twice; name each site once in --sites.")


def read_host(text: str) -> str:
    """Return a host as certificates and clients spell it.

    Raises:
        MisuseError: the text is neither a DNS name nor an IP address.
    """
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if _HOST_NAME.fullmatch(text.lower()):
            return text.lower()
    raise MisuseError(f"{text!r} is neither a DNS name nor an IP address; correct --host.")


def name_host(host: str) -> x509.GeneralName:
    """Return a host as a certificate carries it: an IP address or a DNS name.

    Raises:
        ValueError: a DNS name that is not ASCII.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def list_names(certificate: x509.Certificate) -> list[str]:
    """Return a certificate's subject alternative names as text, in its order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]
