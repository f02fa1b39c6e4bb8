"""Who may call the Fleet API: attacks over real TLS, first without the check and then with it."""

from __future__ import annotations

import datetime
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto import fleet_pb2
from flwr.proto.fleet_pb2_grpc import FleetServicer, FleetStub, add_FleetServicer_to_server
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore.grpc import generic_create_grpc_server
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from grpc.experimental import session_cache

from certs.files import encode_certificates, read_supernode_key
from certs.parties import read_site_keys
from demo.processes import LocalFederation
from fedqlora.credentials import NOT_ADMITTED, ReloadingIdentity, serve_mutual_tls
from fedqlora.errors import ConfigError
from fedqlora.tls import load_identity
from server import admission
from server.admission import Admission
from server.rules import load_rules
from tests.launchers.members import (
    make_leaf,
    make_list,
    read_present_roster,
    revoke,
    rotate,
    sign_roster,
)

ADMITTED = "served"


@pytest.fixture
def keys(certs: Path, tmp_path: Path) -> Path:
    """All key folders, to be changed by a test, with a roster of a, b and c and an empty list."""
    copy = shutil.copytree(certs, tmp_path / "keys", symlinks=True)
    sign_roster(copy)
    revoke(copy)
    return copy


class Fleet(FleetServicer):  # type: ignore[misc]  # Flower's generated code has no types
    """Answers heartbeats, and remembers on what kind of connection they came."""

    resumed: bool | None = None

    def SendNodeHeartbeat(
        self, _request: SendNodeHeartbeatRequest, context: grpc.ServicerContext
    ) -> SendNodeHeartbeatResponse:
        shown: Any = context.auth_context()
        self.resumed = shown["ssl_session_reused"] == [b"true"]
        return SendNodeHeartbeatResponse(success=True)


@dataclass
class Server:
    """Flower's own gRPC server around `Fleet`."""

    port: int
    fleet: Fleet
    channels: list[grpc.Channel] = field(default_factory=list)

    def connect(
        self, keys: Path, site: str, cache: session_cache.SSLSessionCache | None = None
    ) -> grpc.Channel:
        """A new connection with a site's certificate."""
        identity = load_identity(keys / "sites" / site, "client")
        credentials = grpc.ssl_channel_credentials(
            identity.authority_pem, identity.key_pem, identity.chain_pem
        )
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if cache is not None:
            options.append(("grpc.ssl_session_cache", cache))
        channel = grpc.secure_channel(f"localhost:{self.port}", credentials, options)
        self.channels.append(channel)
        return channel


@pytest.fixture
def serve(keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Starts servers; `guard=False` is what there was before admission."""
    monkeypatch.setattr(grpc, "ssl_server_credentials", grpc.ssl_server_credentials)
    monkeypatch.setattr(grpc, "server", grpc.server)
    monkeypatch.setattr(admission, "LOOK_SECONDS", 0.0)
    serve_mutual_tls(ReloadingIdentity(keys / "superlink"))
    plain = grpc.server
    running: list[tuple[Server, grpc.Server]] = []

    def start(*, guard: bool) -> Server:
        grpc.server = plain
        if guard:
            Admission(keys / "superlink").install()
        fleet = Fleet()
        server = generic_create_grpc_server(
            servicer_and_add_fn=(fleet, add_FleetServicer_to_server),
            server_address="127.0.0.1:0",
            certificates=(b"Flower's", b"own", b"files"),
        )
        server.start()
        running.append((Server(int(server.bound_address.rpartition(":")[2]), fleet), server))
        return running[-1][0]

    yield start
    for server, process in running:
        for channel in server.channels:
            channel.close()
        process.stop(grace=None).wait()


def call(channel: grpc.Channel, keys: Path, site: str) -> str:
    """A heartbeat, signed with a site's SuperNode key; `served` or the reason for a refusal."""
    key = read_supernode_key(keys / "sites" / site / "current" / "supernode.key")
    return beat(
        grpc.intercept_channel(
            channel,
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, key.public_key()),
        )
    )


def beat(channel: grpc.Channel, metadata: tuple[tuple[str, bytes], ...] = ()) -> str:
    try:
        FleetStub(channel).SendNodeHeartbeat(
            SendNodeHeartbeatRequest(), timeout=20.0, metadata=metadata
        )
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.UNAUTHENTICATED:
            raise
        return str(error.details())
    return ADMITTED


def serial_of(keys: Path, site: str) -> int:
    return load_identity(keys / "sites" / site, "client").leaf.serial_number


def test_a_revoked_certificate_keeps_its_open_connection_only_without_the_check(
    keys: Path, serve: Callable[..., Server]
) -> None:
    open_door, guarded = serve(guard=False), serve(guard=True)
    before, a, b = (
        open_door.connect(keys, "a"),
        guarded.connect(keys, "a"),
        guarded.connect(keys, "b"),
    )
    assert [call(before, keys, "a"), call(a, keys, "a"), call(b, keys, "b")] == [ADMITTED] * 3
    revoke(keys, [serial_of(keys, "a")])
    assert call(before, keys, "a") == ADMITTED
    assert call(a, keys, "a") == NOT_ADMITTED
    assert call(b, keys, "b") == ADMITTED


@pytest.mark.parametrize("guard", [False, True])
def test_a_revoked_certificate_comes_back_by_resuming_its_session_only_without_the_check(
    keys: Path, serve: Callable[..., Server], guard: bool
) -> None:
    server, cache = serve(guard=guard), session_cache.ssl_session_cache_lru(4)
    first = server.connect(keys, "a", cache)
    assert call(first, keys, "a") == ADMITTED
    assert server.fleet.resumed is False
    first.close()
    second = server.connect(keys, "a", cache)
    assert call(second, keys, "a") == ADMITTED
    assert server.fleet.resumed is True
    second.close()
    server.fleet.resumed = None
    revoke(keys, [serial_of(keys, "a")])
    answer = call(server.connect(keys, "a", cache), keys, "a")
    assert (answer, server.fleet.resumed) == ((NOT_ADMITTED, None) if guard else (ADMITTED, True))


def test_a_site_that_leaves_the_roster_loses_its_open_connection_only_with_the_check(
    keys: Path, serve: Callable[..., Server]
) -> None:
    open_door, guarded = serve(guard=False), serve(guard=True)
    before, after = open_door.connect(keys, "a"), guarded.connect(keys, "a")
    assert [call(before, keys, "a"), call(after, keys, "a")] == [ADMITTED] * 2
    sites = dict(read_present_roster(keys).sites)
    del sites["a"]
    sign_roster(keys, sites)
    assert [call(before, keys, "a"), call(after, keys, "a")] == [ADMITTED, NOT_ADMITTED]


def test_the_node_key_of_another_site_is_taken_only_without_the_check(
    keys: Path, serve: Callable[..., Server]
) -> None:
    open_door, guarded = serve(guard=False), serve(guard=True)
    assert call(open_door.connect(keys, "a"), keys, "b") == ADMITTED
    channel = guarded.connect(keys, "a")
    assert call(channel, keys, "b") == NOT_ADMITTED
    assert call(channel, keys, "a") == ADMITTED


def test_a_call_with_no_node_key_or_with_two_is_refused(
    keys: Path, serve: Callable[..., Server]
) -> None:
    channel = serve(guard=True).connect(keys, "a")
    own, other = (
        read_supernode_key(keys / "sites" / site / "current" / "supernode.key")
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        for site in ("a", "b")
    )
    name = "flwr-public-key-bin"
    assert beat(channel, ((name, own),)) == ADMITTED
    assert beat(channel) == NOT_ADMITTED
    assert beat(channel, ((name, own), (name, other))) == NOT_ADMITTED
    assert beat(channel, ((name, own), (name, own))) == NOT_ADMITTED


def test_a_certificate_of_our_authority_for_a_key_that_nobody_signed_is_refused(
    keys: Path, serve: Callable[..., Server]
) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    pem = stranger.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    rotate(
        keys / "sites" / "a",
        {"client.key": pem, "client.crt": make_leaf(keys, "a", stranger)},
    )
    assert call(serve(guard=False).connect(keys, "a"), keys, "a") == ADMITTED
    assert call(serve(guard=True).connect(keys, "a"), keys, "a") == NOT_ADMITTED


def test_a_certificate_that_gives_a_sites_key_another_name_is_refused(
    keys: Path, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    folder = keys / "sites" / "a" / "current"
    key = serialization.load_pem_private_key((folder / "client.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    rotate(keys / "sites" / "a", {"client.crt": make_leaf(keys, "b", key)})
    channel = serve(guard=True).connect(keys, "a")
    assert call(channel, keys, "a") == NOT_ADMITTED
    assert call(channel, keys, "b") == NOT_ADMITTED
    assert "holds the key of site a" in caplog.text


def test_an_authority_that_is_retired_loses_the_open_connections_of_its_sites(
    keys: Path, foreign_certs: Path, serve: Callable[..., Server]
) -> None:
    server = serve(guard=True)
    channel = server.connect(keys, "a")
    assert call(channel, keys, "a") == ADMITTED
    other = x509.load_pem_x509_certificate((foreign_certs / "authority" / "sites.crt").read_bytes())
    rotate(
        keys / "superlink",
        {"ca.crt": encode_certificates(other), "crl.pem": make_list(foreign_certs, [])},
    )
    assert call(channel, keys, "a") == NOT_ADMITTED


def test_a_site_that_is_quicker_than_the_next_look_is_let_in(keys: Path) -> None:
    sites = dict(read_present_roster(keys).sites)
    own = sites.pop("a")
    sign_roster(keys, sites)
    rules = Admission(keys / "superlink")
    assert not rules.admits(*shown(keys, "a"))
    sign_roster(keys, {**sites, "a": own})
    assert rules.admits(*shown(keys, "a"))


def test_a_refusal_is_logged_once_a_minute_with_the_site_and_the_reason(
    keys: Path, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    channel = serve(guard=True).connect(keys, "a")
    revoke(keys, [serial_of(keys, "a")])
    for _ in range(3):
        assert call(channel, keys, "a") == NOT_ADMITTED
    lines = [record.message for record in caplog.records if "Refusing" in record.message]
    serial = load_identity(keys / "sites" / "a", "client").serial
    assert lines == [
        f"Refusing the calls of site a: its certificate with serial {serial} is revoked."
    ]


def spoil(keys: Path, foreign: Path, case: str) -> None:
    """One way in which a change of the SuperLink's folder can be wrong."""
    folder = keys / "superlink" / "current"
    if case == "garbage roster":
        (folder / "roster.json").write_bytes(b"garbage")
    elif case == "edited roster":
        text = (folder / "roster.json").read_text().replace('"a"', '"z"')
        (folder / "roster.json").write_text(text)
    elif case == "roster of another coordinator":
        sign_roster(foreign)
        for name in ("roster.json", "roster.sig"):
            shutil.copy(foreign / "superlink" / "current" / name, folder / name)
    elif case == "garbage list":
        (folder / "crl.pem").write_bytes(b"garbage")
    elif case == "no list":
        (folder / "crl.pem").unlink()
    elif case == "list of another authority":
        (folder / "crl.pem").write_bytes(make_list(keys, [], authority="server"))
    elif case == "forged list":
        (folder / "crl.pem").write_bytes(make_list(foreign, []))
    else:
        sites = dict(read_present_roster(keys).sites)
        sites["b"] = sites["a"]
        sign_roster(keys, sites)


@pytest.mark.parametrize(
    "case",
    [
        "garbage roster",
        "edited roster",
        "roster of another coordinator",
        "garbage list",
        "no list",
        "list of another authority",
        "forged list",
        "one key for two sites",
    ],
)
def test_a_bad_change_keeps_the_last_good_rules_and_says_so(
    keys: Path,
    foreign_certs: Path,
    tmp_path: Path,
    serve: Callable[..., Server],
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    server = serve(guard=True)
    rules = Admission(keys / "superlink")
    revoke(keys, [serial_of(keys, "b")])
    a, b = server.connect(keys, "a"), server.connect(keys, "b")
    assert [call(a, keys, "a"), call(b, keys, "b")] == [ADMITTED, NOT_ADMITTED]
    assert rules.problem is None
    foreign = shutil.copytree(foreign_certs, tmp_path / "foreign", symlinks=True)
    spoil(keys, foreign, case)
    caplog.clear()
    for _ in range(2):
        assert [call(a, keys, "a"), call(b, keys, "b")] == [ADMITTED, NOT_ADMITTED]
    assert len([one for one in caplog.messages if one.startswith("Keeping the roster")]) == 1
    assert rules.problem is not None
    with pytest.raises(ConfigError):
        Admission(keys / "superlink")
    sign_roster(keys, collect(keys))
    revoke(keys, [serial_of(keys, "a")])
    assert [call(a, keys, "a"), call(b, keys, "b")] == [NOT_ADMITTED, ADMITTED]
    assert rules.problem is None


def collect(keys: Path) -> dict[str, Any]:
    """What belongs into the roster."""
    return {site: read_site_keys(keys / "sites" / site / "current") for site in ("a", "b", "c")}


@pytest.mark.parametrize("name", ["crl.pem", "roster.json", "roster.sig", "coordinator.pub"])
def test_a_start_without_rules_is_refused_with_the_command_that_makes_them(
    keys: Path, name: str
) -> None:
    (keys / "superlink" / "current" / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}.*make certs"):
        Admission(keys / "superlink")


def test_a_list_that_has_ended_goes_on_revoking_and_closes_no_door(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    revoke(keys, [serial_of(keys, "b")], days=-1)
    rules = Admission(keys / "superlink")
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert rules.admits(*shown(keys, "a"))
    assert not rules.admits(*shown(keys, "b"))
    assert [one for one in caplog.messages if "has ended" in one] == [rules.problem]


def shown(keys: Path, site: str) -> tuple[bytes, bytes]:
    """Certificate and SuperNode key of a site, as a call shows them."""
    leaf = load_identity(keys / "sites" / site, "client").leaf
    key = read_supernode_key(keys / "sites" / site / "current" / "supernode.key").public_key()
    return leaf.public_bytes(serialization.Encoding.PEM), key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_a_certificate_that_expires_is_refused_though_its_connection_stays(keys: Path) -> None:
    rules = load_rules(keys / "superlink")
    certificate, node_key = shown(keys, "a")
    end = load_identity(keys / "sites" / "a", "client").leaf.not_valid_after_utc
    assert rules.refuse(certificate, node_key, end.timestamp() - 1) is None
    late = rules.refuse(certificate, node_key, (end + datetime.timedelta(seconds=1)).timestamp())
    assert late is not None
    assert late.reason == "its certificate has expired"


@pytest.mark.parametrize("certificate", [b"", b"garbage"])
def test_a_call_without_a_readable_certificate_is_refused(keys: Path, certificate: bytes) -> None:
    assert not Admission(keys / "superlink").admits(certificate, shown(keys, "a")[1])


def test_every_method_of_the_fleet_api_is_one_request_and_one_reply() -> None:
    """Admission asks once, when a call begins: a stream would outlive a revocation."""
    methods = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods
    assert len(methods) > 5
    assert not [m.name for m in methods if m.client_streaming or m.server_streaming]


def test_a_stream_is_refused(keys: Path) -> None:
    guard = Admission(keys / "superlink")
    handler = guard.intercept_service(
        lambda _details: grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter("x")),
        Details(),  # type: ignore[arg-type]
    )
    assert handler is not None
    assert handler.unary_stream is None
    assert handler.unary_unary is not None
    with pytest.raises(RuntimeError, match="UNAUTHENTICATED"):
        handler.unary_unary(b"", Context())  # type: ignore[arg-type]


class Details:
    """What gRPC tells an interceptor."""

    method = "/flwr.proto.Fleet/Stream"
    invocation_metadata = ()


class Context:
    """As much of a call's context as a refusal needs."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise RuntimeError(f"{code.name}: {details}")


@pytest.mark.slow
def test_the_real_superlink_refuses_a_certificate_with_the_node_key_of_another_site(
    federation: LocalFederation, certs: Path
) -> None:
    """Fails when a new Flower makes its Fleet server in another way."""
    server = Server(int(federation.fleet_address.rpartition(":")[2]), Fleet())
    channel = server.connect(certs, "a")
    # Flower's own check comes after ours: the heartbeat names no node.
    assert call(channel, certs, "a") == "Invalid node ID"
    assert call(channel, certs, "b") == NOT_ADMITTED
    channel.close()
