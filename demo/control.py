"""A client of the SuperLink's Control API: registers site keys, starts runs and follows them.

What `flwr supernode register`, `flwr run` and `flwr ls` do, without a process and a
configuration file for each. The Control API has no login (DESIGN 5.2): whoever reaches it may
do all of this.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StreamLogsRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedqlora.errors import FederationError

# It logs every request at INFO.
logging.getLogger("httpx").setLevel(logging.WARNING)

RunValue = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the SuperLink knows of a run."""

    status: str
    """`pending`, `starting`, `running` or `finished`."""
    outcome: str
    """`completed`, `failed` or `stopped` once finished, else empty."""
    details: str
    """Flower's reason for a failure, may be empty."""


class ControlClient:
    """The Control API of one SuperLink, over TLS."""

    def __init__(self, address: str, authority: Path) -> None:
        """Makes the client; nothing is sent yet.

        Args:
            address: HOST:PORT of the Control API.
            authority: file with the authority of the SuperLink's certificate.
        """
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def answers(self) -> bool:
        """Whether the Control API can be reached."""
        try:
            self._client.ListNodes(ListNodesRequest())
        except httpx.TransportError:
            return False
        return True

    def list_online(self) -> set[bytes]:
        """Public keys (PEM) of the SuperNodes that are online; none if nobody answers."""
        try:
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        except httpx.TransportError:
            return set()
        return {node.public_key for node in nodes if node.status == "online"}

    def register(self, public_key: Path, name: str) -> bytes:
        """Registers a SuperNode's key unless it is; returns it as PEM.

        Raises:
            FederationError: the SuperLink refuses it; a key that was once unregistered is
                burned for good.
        """
        key = load_ssh_public_key(public_key.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise FederationError(f"{public_key} is not an elliptic-curve key: make a new one.")
        pem = public_key_to_bytes(key)
        known = {
            node.public_key
            for node in self._client.ListNodes(ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }
        if pem in known:
            return pem
        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        except httpx.HTTPStatusError:
            raise FederationError(
                f"The SuperLink refuses to register {public_key}: if the key was unregistered "
                "before, make a new one."
            ) from None
        return pem

    def start_run(self, app: Path, config: Mapping[str, RunValue]) -> int:
        """Packs the Flower app in a folder, starts a run of it and returns the run's id.

        Raises:
            FederationError: the app cannot be packed, or the SuperLink refuses it.
        """
        try:
            with warnings.catch_warnings():
                # Flower 1.39 names a pattern style that its pathspec has renamed.
                warnings.simplefilter("ignore", DeprecationWarning)
                bundle = build_fab_from_disk(app)
        except Exception as error:  # Flower raises click's, typer's and its own errors here
            raise FederationError(
                f"The Flower app in {app} cannot be packed ({error}): check its pyproject.toml."
            ) from error
        request = StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle),
            override_config=user_config_to_proto(dict(config)),
        )
        try:
            reply = self._client.StartRun(request)
        except httpx.HTTPStatusError as error:
            raise FederationError(
                f"The SuperLink refuses the run ({error.response.text.strip()}): check that the "
                "keys of its configuration exist in pyproject.toml."
            ) from None
        return reply.run_id

    def read_run(self, run_id: int) -> RunState | None:
        """The present state of a run; None if nobody answers."""
        try:
            run = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        except httpx.TransportError:
            return None
        return RunState(
            status=run.status.status, outcome=run.status.sub_status, details=run.status.details
        )

    def stream_output(self, run_id: int, after: float) -> Iterator[tuple[str, float]]:
        """Yields pieces of a ServerApp's output and their time stamps, until the run has ended.

        Args:
            run_id: Flower's id of the run.
            after: time stamp of the last piece that is known already, 0 for none.
        """
        request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
        # The SuperLink may go away at any time: the caller asks again with the last time stamp.
        with contextlib.suppress(httpx.TransportError):
            for reply in self._client.StreamLogs(request):
                yield reply.log_output, reply.latest_timestamp
