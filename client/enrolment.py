"""The trial before a SuperNode starts: is the SuperLink there, trusted, and does it know this node?

Flower answers these questions with a traceback, a retry for ever or a process that idles; here
each ends as one sentence.
"""

from __future__ import annotations

import logging
import time
from typing import Literal

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedqlora.credentials import NOT_ADMITTED
from fedqlora.errors import FederationError
from fedqlora.tls import Identity, probe_server

logger = logging.getLogger("client")

RETRY_SECONDS = 3.0
"""Time between two trials."""

RESTART_PATIENCE_SECONDS = 90.0
"""How long a refusal may come from this node's own last life: a SuperNode that was killed counts
as online until its heartbeat expires, 60 s, and until then the SuperLink refuses a second one."""

_HEARTBEAT_SECONDS = 30.0  # Flower's own interval, which it asks back in ActivateNode


def wait_until_enrolled(
    superlink: tuple[str, int],
    identity: Identity,
    key: ec.EllipticCurvePrivateKey,
    wait_seconds: float | None,
) -> None:
    """Returns once the SuperLink has accepted this node in a trial.

    Args:
        superlink: host and port of the Fleet API.
        identity: this site's TLS identity.
        key: the SuperNode's key, which lies in the same folder.
        wait_seconds: how long to wait for a SuperLink that does not answer; None for ever.

    Raises:
        FederationError: no answer in time, a certificate refused by either side, the node's key
            is not registered, or the clocks differ too much.
    """
    start = time.monotonic()
    reported: str | None = None
    first_refusal: float | None = None
    while True:
        now = time.monotonic()
        reason = "no answer"
        try:
            state = _try_once(superlink, identity, key)
        except OSError as error:
            state, reason = "silent", error.strerror or str(error)
        if state == "enrolled":
            return
        patience = float("inf") if wait_seconds is None else wait_seconds
        if state == "refused":
            first_refusal = first_refusal or now
            sentence = (
                f"The SuperLink at {superlink[0]}:{superlink[1]} does not know the key "
                f"{identity.folder / 'supernode.key'}, or it is in use by another SuperNode: "
                "send supernode.pub to the coordinator to have it registered."
            )
            over = now - first_refusal > min(RESTART_PATIENCE_SECONDS, patience)
        else:
            first_refusal = None
            sentence = (
                f"The SuperLink at {superlink[0]}:{superlink[1]} cannot be reached ({reason}): "
                "check its address, that it runs, and that a firewall lets this site out."
            )
            over = now - start > patience
        if over:
            raise FederationError(sentence)
        if state != reported:
            logger.warning("%s Trying again until it works.", sentence)
            reported = state
        time.sleep(min(RETRY_SECONDS, max(0.1, patience / 4)))


def _try_once(
    superlink: tuple[str, int], identity: Identity, key: ec.EllipticCurvePrivateKey
) -> Literal["enrolled", "refused", "silent"]:
    """One handshake with exact errors, then one activation and deactivation of this node."""
    host, port = superlink
    serial = probe_server(host, port, identity)
    with _open_channel(superlink, identity) as channel:
        stub = _sign_calls(channel, key)
        try:
            node = stub.ActivateNode(
                ActivateNodeRequest(
                    public_key=public_key_to_bytes(key.public_key()),
                    heartbeat_interval=_HEARTBEAT_SECONDS,
                ),
                timeout=10.0,
            )
            stub.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id), timeout=10.0)
        except grpc.RpcError as error:
            return _judge(error, f"{host}:{port}")
    logger.info("The SuperLink at %s:%d (serial %s) knows this node.", host, port, serial)
    return "enrolled"


def is_admitted(key: ec.EllipticCurvePrivateKey, channel: grpc.Channel) -> bool:
    """Whether the SuperLink admits this node's calls over a channel; changes nothing there."""
    try:
        _ask(channel, key)
    except grpc.RpcError as error:
        refused = error.details() == NOT_ADMITTED
        return error.code() == grpc.StatusCode.UNAUTHENTICATED and not refused
    return True


def try_call(
    superlink: tuple[str, int], identity: Identity, key: ec.EllipticCurvePrivateKey
) -> str:
    """One handshake and one signed call that changes nothing; the node may be online meanwhile.

    The signature covers a time, so this also compares the clocks, as every call of the site will
    have to: at most 5 seconds ahead of the SuperLink's, or 305 behind.

    Returns:
        The serial number of the SuperLink's certificate, in hex.

    Raises:
        FederationError: a certificate is refused by either side, or the clocks differ too much.
        OSError: nothing answers there.
    """
    host, port = superlink
    serial = probe_server(host, port, identity)
    with _open_channel(superlink, identity) as channel:
        try:
            _ask(channel, key)
        except grpc.RpcError as error:
            details = error.details() or ""
            unknown = error.code() == grpc.StatusCode.UNAUTHENTICATED
            # Flower's last check: no node has the number 0. All before it were passed.
            refused = not unknown or details == NOT_ADMITTED or "timestamp" in details
            if refused and _judge(error, f"{host}:{port}") == "silent":
                raise OSError(f"no answer to a call ({details})") from None
    return serial


def _open_channel(superlink: tuple[str, int], identity: Identity) -> grpc.Channel:
    """A connection of its own, with this site's certificate."""
    host, port = superlink
    credentials = grpc.ssl_channel_credentials(
        identity.authority_pem, identity.key_pem, identity.chain_pem
    )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return grpc.secure_channel(address, credentials)


def _ask(channel: grpc.Channel, key: ec.EllipticCurvePrivateKey) -> None:
    """A heartbeat for a node that cannot be, so the node itself may be online meanwhile.

    Every other check lets it through to Flower's own, the last, which always refuses it.

    Raises:
        grpc.RpcError: which check has refused it.
    """
    request = SendNodeHeartbeatRequest(node=Node(node_id=0), heartbeat_interval=_HEARTBEAT_SECONDS)
    _sign_calls(channel, key).SendNodeHeartbeat(request, timeout=10.0)


def _sign_calls(channel: grpc.Channel, key: ec.EllipticCurvePrivateKey) -> FleetStub:
    """The Fleet API with what Flower's SuperNode adds to each call."""
    return FleetStub(
        grpc.intercept_channel(
            channel,
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, key.public_key()),
        )
    )


def _judge(error: grpc.RpcError, where: str) -> Literal["refused", "silent"]:
    """Tells a refusal that may pass from one that will not, which is raised."""
    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return "silent"
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return "refused"
    if details == NOT_ADMITTED:
        raise FederationError(
            f"The SuperLink at {where} does not admit this site: its certificate is revoked, or "
            "the coordinator's roster holds other keys for it; ask the coordinator."
        )
    if "timestamp" in details:
        raise FederationError(
            f"The SuperLink at {where} refuses this node's signature because the clocks differ by "
            "more than 5 seconds: set this machine's clock (NTP)."
        )
    raise FederationError(
        f"The SuperLink at {where} refuses this node ({code.name}): check that it runs the same "
        "version of Flower and that the coordinator registered this node's key."
    )
