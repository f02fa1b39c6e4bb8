"""A client of the SuperLink's Control API: registers site keys, starts runs and follows them.

What `flwr supernode register`, `flwr run`, `flwr stop` and `flwr ls` do, without a process and
a configuration file for each. The Control API has no login (DESIGN 5.2): whoever reaches it may
do all of this.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedqlora.address import split_address
from fedqlora.errors import ConfigError, FederationError
from server.bundle import Bundle
from server.state import Node, RunState, read_node_key

# It logs every request at INFO.
logging.getLogger("httpx").setLevel(logging.WARNING)

RunValue = str | int | float | bool

_POLL_SECONDS = 0.5  # between two questions whether the SuperLink answers


class ControlClient:
    """The Control API of one SuperLink, over TLS."""

    def __init__(self, address: str, authority: Path) -> None:
        """Makes the client; nothing is sent yet.

        Args:
            address: HOST:PORT of the Control API.
            authority: file with the authority of the SuperLink's certificate.

        Raises:
            ConfigError: the address or the file cannot be used.
        """
        split_address(address, "--control")
        self.address = address
        self._authority = authority
        try:
            self._client = ControlHttpClient.from_server_address(
                server_address=address,
                insecure=False,
                root_certificates=authority.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        except (OSError, ValueError, ssl.SSLError) as error:
            raise ConfigError(
                f"{authority} holds no readable certificate ({error}): point --root-certificates "
                "at root.crt."
            ) from None

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

    def wait(self, seconds: float) -> None:
        """Waits until the Control API answers.

        Raises:
            FederationError: it does not in time, or its certificate is not one to trust.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._client.ListNodes(ListNodesRequest())
                return
            except httpx.HTTPError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise FederationError(
                        f"The certificate of {self.address} is not one that {self._authority} "
                        f"vouches for under that name ({error}): use the SuperLink's root.crt and "
                        "a name in its certificate."
                    ) from None
                if time.monotonic() > deadline:
                    raise self._absent(error) from None
            time.sleep(_POLL_SECONDS)

    def list_nodes(self) -> list[Node]:
        """All SuperNodes that were ever registered; none if nobody answers."""
        try:
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        except httpx.TransportError:
            return []
        return [Node.read(node) for node in nodes]

    def list_online(self) -> set[bytes]:
        """Public keys (PEM) of the SuperNodes that are online; none if nobody answers."""
        return {node.key for node in self.list_nodes() if node.status == "online"}

    def register(self, public_key: Path, name: str) -> bytes:
        """Registers the SuperNode's key in a file unless it is; returns it as PEM.

        Raises:
            ConfigError: the file holds another kind of key.
            FederationError: the SuperLink refuses it; see `enrol`.
        """
        key = read_node_key(public_key.read_bytes(), str(public_key))
        self.enrol(key, name)
        return key

    def enrol(self, key: bytes, name: str) -> bool:
        """Registers a SuperNode's key (PEM) unless it is; returns whether it did.

        Raises:
            FederationError: the SuperLink refuses it; a key that was once unregistered is
                burned for good.
        """
        if any(node.key == key and node.status != "unregistered" for node in self.list_nodes()):
            return False
        try:
            with self._reached():
                self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        except httpx.HTTPStatusError:
            raise FederationError(
                f"The SuperLink refuses to register the key of {name}: if it was unregistered "
                "before, make a new one."
            ) from None
        return True

    def unregister(self, name: str) -> bool:
        """Ends a site's membership for good, its key with it; whether there was one to end.

        The site's SuperNode is offline at once and ends itself when it next calls.

        Raises:
            FederationError: the SuperLink does not answer or refuses.
        """
        try:
            with self._reached():
                found = [
                    node.node_id
                    for node in self._client.ListNodes(ListNodesRequest()).nodes_info
                    if node.name == name and node.status != "unregistered"
                ]
                for node_id in found:
                    self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        except httpx.HTTPStatusError as error:
            raise FederationError(
                f"The SuperLink refuses to unregister site {name} ({error.response.text.strip()}): "
                "look at its log and try again."
            ) from None
        return bool(found)

    def start_run(self, bundle: Bundle, config: Mapping[str, RunValue]) -> int:
        """Starts a run of a packed app and returns the run's id.

        Raises:
            FederationError: the SuperLink refuses it.
        """
        request = StartRunRequest(
            fab=Fab(hash_str=bundle.digest, content=bundle.content),
            override_config=user_config_to_proto(dict(config)),
        )
        try:
            with self._reached():
                return self._client.StartRun(request).run_id
        except httpx.HTTPStatusError as error:
            raise FederationError(
                f"The SuperLink refuses the run ({error.response.text.strip()}): check that the "
                "keys of its configuration exist in pyproject.toml."
            ) from None

    def stop_run(self, run_id: int) -> bool:
        """Has a run stopped; whether the SuperLink was there to do so. One that ended is fine."""
        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except httpx.HTTPStatusError:
            pass  # it ended by itself
        except httpx.TransportError:
            return False
        return True

    def list_runs(self) -> list[RunState]:
        """All runs that the SuperLink knows, the newest first; none if nobody answers."""
        try:
            runs = self._client.ListRuns(ListRunsRequest()).run_dict.values()
        except httpx.TransportError:
            return []
        return [RunState.read(run) for run in sorted(runs, key=lambda run: run.pending_at)[::-1]]

    def read_run(self, run_id: int) -> RunState | None:
        """The present state of a run; None if nobody answers.

        Raises:
            FederationError: the SuperLink has no such run.
        """
        try:
            runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except httpx.TransportError:
            return None
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:  # on its way down or up
                return None
            raise FederationError(
                f"The SuperLink at {self.address} does not know run {run_id} "
                f"({error.response.status_code}): its state was replaced; resume the run folder."
            ) from None
        return RunState.read(runs[run_id])

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Turns a SuperLink that does not answer into our error."""
        try:
            yield
        except httpx.TransportError as error:
            raise self._absent(error) from None

    def _absent(self, error: httpx.HTTPError) -> FederationError:
        return FederationError(
            f"The SuperLink's Control API at {self.address} does not answer "
            f"({str(error) or type(error).__name__}): start the SuperLink, or correct --control."
        )

    def stream_output(self, run_id: int, after: float) -> Iterator[tuple[str, float]]:
        """Yields pieces of a ServerApp's output and their time stamps, until the run has ended.

        Args:
            run_id: Flower's id of the run.
            after: time stamp of the last piece that is known already, 0 for none.
        """
        request = StreamLogsRequest(run_id=run_id, after_timestamp=after)
        # The SuperLink may go away at any time: the caller asks again with the last time stamp.
        with contextlib.suppress(httpx.HTTPError):
            for reply in self._client.StreamLogs(request):
                yield reply.log_output, reply.latest_timestamp
