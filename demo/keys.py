"""Development keys: made where they are missing, refused where they are no longer good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from certs.files import CertificateError
from certs.inspection import inspect_all
from certs.site import make_all


def make_keys(out: Path, names: Sequence[str], hosts: Sequence[str], advice: str) -> list[str]:
    """Make what keys and certificates are missing; returns a line for each party.

    Args:
        out: the folder of all parties.
        names: the sites.
        hosts: names of the SuperLink, besides the local ones.
        advice: what to do about certificates that are not usable, as the end of a sentence.

    Raises:
        CertificateError: what is there has expired, does not fit or is not whole.
    """
    made = make_all(out, names, hosts)
    if problems := inspect_all(out).problems:
        raise CertificateError(f"{out} is not usable: {problems[0].rstrip('.')}; {advice}")
    return made
