"""Real TLS handshakes between a gRPC server and clients, with the files that certs writes."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from certs.authority import Issuer, issue_server, issue_site, read_authority
from certs.files import encode_certificates, read_tls_key
from certs.site import make_all
from tests.certs.peers import assert_refused, call, call_as_site, serving, superlink

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another federation, whose parties have the same names."""
    out = tmp_path_factory.mktemp("stranger")
    make_all(out, ["a"])
    return out


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "superlink", "fed.example.org"])
def test_a_site_is_accepted_over_tls_1_3_under_each_of_the_servers_names(
    federation: Path, host: str
) -> None:
    with superlink(federation) as port:
        seen = call_as_site(port, federation, "b", host)
    assert seen["ssl_tls_version"] == "TLSv1.3"
    assert seen["peer_uri"] == "urn:fedqlora:site:b"


def test_a_server_is_refused_under_a_name_that_it_does_not_have(federation: Path) -> None:
    with superlink(federation) as port:
        assert_refused(
            lambda: call_as_site(port, federation, host="other.example.org"),
            "Hostname Verification Check failed",
        )


def test_a_server_of_another_authority_is_refused(federation: Path, stranger: Path) -> None:
    with superlink(stranger) as port:
        assert_refused(lambda: call_as_site(port, federation), "CERTIFICATE_VERIFY_FAILED")
        assert call_as_site(port, stranger)


def test_a_client_of_another_authority_is_refused(federation: Path, stranger: Path) -> None:
    theirs = stranger / "sites" / "a" / "current"
    trust = (federation / "sites" / "a" / "current" / "ca.crt").read_bytes()
    key, chain = ((theirs / name).read_bytes() for name in ("client.key", "client.crt"))
    with superlink(federation) as port:
        assert_refused(lambda: call(port, trust, key, chain))
        assert call_as_site(port, federation)


def test_a_client_without_a_certificate_is_refused(federation: Path) -> None:
    trust = (federation / "sites" / "a" / "current" / "ca.crt").read_bytes()
    with superlink(federation) as port:
        assert_refused(lambda: call(port, trust, None, None))
        assert call_as_site(port, federation)


@pytest.mark.parametrize("days", [-91, 2], ids=["expired", "not yet valid"])
def test_a_client_certificate_outside_its_dates_is_refused(federation: Path, days: int) -> None:
    folder = federation / "sites" / "a" / "current"
    authority = read_authority(federation / "authority")
    key = read_tls_key(folder / "client.key")
    leaf = issue_site(authority.sites, key.public_key(), "a", NOW + datetime.timedelta(days=days))
    trust, private = ((folder / name).read_bytes() for name in ("ca.crt", "client.key"))
    with superlink(federation) as port:
        assert_refused(lambda: call(port, trust, private, encode_certificates(leaf)))
        assert call_as_site(port, federation)


@pytest.mark.parametrize("days", [-91, 2], ids=["expired", "not yet valid"])
def test_a_server_certificate_outside_its_dates_is_refused(federation: Path, days: int) -> None:
    folder = federation / "superlink" / "current"
    authority = read_authority(federation / "authority")
    key = read_tls_key(folder / "server.key")
    moment = NOW + datetime.timedelta(days=days)
    leaf = issue_server(authority.server, key.public_key(), ["localhost"], moment)
    chain = encode_certificates(leaf, authority.server.certificate)
    private, trust = ((folder / name).read_bytes() for name in ("server.key", "ca.crt"))
    with serving(private, chain, trust) as port:
        assert_refused(lambda: call_as_site(port, federation), "CERTIFICATE_VERIFY_FAILED")


@pytest.mark.parametrize("trusted", ["ca.crt", "root.crt"])
def test_a_server_certificate_is_refused_as_a_clients(federation: Path, trusted: str) -> None:
    # With the root trusted only the purpose is left to refuse it: it must hold on its own.
    folder = federation / "superlink" / "current"
    root, key, chain, trust = (
        (folder / name).read_bytes() for name in ("root.crt", "server.key", "server.crt", trusted)
    )
    with serving(key, chain, trust) as port:
        assert_refused(lambda: call(port, root, key, chain))
        assert call_as_site(port, federation)


def test_a_site_certificate_is_refused_as_a_servers(federation: Path) -> None:
    folder = federation / "sites" / "b" / "current"
    key, chain = ((folder / name).read_bytes() for name in ("client.key", "client.crt"))
    trust = (federation / "superlink" / "current" / "ca.crt").read_bytes()
    with serving(key, chain, trust) as port:
        assert_refused(lambda: call_as_site(port, federation), "CERTIFICATE_VERIFY_FAILED")


def test_the_sites_authority_cannot_make_a_server(federation: Path) -> None:
    folder = federation / "superlink" / "current"
    authority = read_authority(federation / "authority")
    key = read_tls_key(folder / "server.key")
    leaf = issue_server(authority.sites, key.public_key(), ["localhost"], NOW)
    chain = encode_certificates(leaf, authority.sites.certificate)
    private, trust = ((folder / name).read_bytes() for name in ("server.key", "ca.crt"))
    with serving(private, chain, trust) as port:
        assert_refused(lambda: call_as_site(port, federation), "CERTIFICATE_VERIFY_FAILED")


def test_the_server_authority_cannot_make_a_site(federation: Path) -> None:
    folder = federation / "sites" / "a" / "current"
    authority = read_authority(federation / "authority")
    key = read_tls_key(folder / "client.key")
    leaf = issue_site(authority.server, key.public_key(), "a", NOW)
    chain = encode_certificates(leaf, authority.server.certificate, authority.root)
    trust, private = ((folder / name).read_bytes() for name in ("ca.crt", "client.key"))
    with superlink(federation) as port:
        assert_refused(lambda: call(port, trust, private, chain))
        assert call_as_site(port, federation)


def test_a_client_certificate_from_the_root_itself_is_refused(federation: Path) -> None:
    # Its purpose and chain are good: only that the server trusts less than the root stops it.
    folder = federation / "sites" / "a" / "current"
    root = Issuer(
        read_authority(federation / "authority").root,
        read_tls_key(federation / "authority" / "ca.key"),
    )
    leaf = issue_site(root, read_tls_key(folder / "client.key").public_key(), "a", NOW)
    trust, private = ((folder / name).read_bytes() for name in ("ca.crt", "client.key"))
    chain = encode_certificates(leaf, root.certificate)
    with superlink(federation) as port:
        assert_refused(lambda: call(port, trust, private, chain))
        assert call_as_site(port, federation)
