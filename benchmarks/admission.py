"""What admission costs per call of the Fleet API: the decision alone, and within a real call.

The decision: certificate and node key looked up as for every call after a connection's first.
Within a call: medians of heartbeats over TLS on loopback to Flower's own gRPC server, with the
check and without, taken in turns. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import timeit
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2_grpc import FleetServicer, FleetStub, add_FleetServicer_to_server
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.supercore.grpc import generic_create_grpc_server

from certs.site import make_all
from fedqlora.credentials import ReloadingIdentity, serve_mutual_tls
from fedqlora.tls import load_identity
from server.admission import Admission
from server.state import read_node_key


class Fleet(FleetServicer):
    """Answers heartbeats."""

    def SendNodeHeartbeat(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002
        """Says yes."""
        return SendNodeHeartbeatResponse(success=True)


def serve() -> tuple[grpc.Server, str]:
    """Starts Flower's gRPC server on a free port."""
    server: Any = generic_create_grpc_server(
        servicer_and_add_fn=(Fleet(), add_FleetServicer_to_server),  # type: ignore[abstract]
        server_address="127.0.0.1:0",
        certificates=(b"replaced", b"by", b"ours"),
    )
    server.start()
    return server, f"localhost:{server.bound_address.rpartition(':')[2]}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        make_all(certs, ["a", "b", "c"])
        site = certs / "sites" / "a"
        identity = load_identity(site, "client")
        leaf = identity.leaf.public_bytes(serialization.Encoding.PEM)
        node_key = read_node_key((site / "current" / "supernode.pub").read_bytes(), "supernode.pub")
        serve_mutual_tls(ReloadingIdentity(certs / "superlink"))
        open_door = serve()
        admission = Admission(certs / "superlink")
        admission.install()
        guarded = serve()
        fresh = min(
            timeit.repeat(lambda: Admission(certs / "superlink").admits(leaf, node_key), number=10)
        )
        # gRPC makes new bytes for each call, which are hashed anew.
        known = min(
            timeit.repeat(
                lambda: admission.admits(bytes(memoryview(leaf)), bytes(memoryview(node_key))),
                number=calls,
            )
        )
        stubs = []
        for _, address in (open_door, guarded):
            credentials = grpc.ssl_channel_credentials(
                identity.authority_pem, identity.key_pem, identity.chain_pem
            )
            stubs.append(FleetStub(grpc.secure_channel(address, credentials)))
        seconds: list[list[float]] = [[], []]
        for _ in range(calls):
            for stub, taken in zip(stubs, seconds, strict=True):
                start = time.perf_counter()
                stub.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(), metadata=(("flwr-public-key-bin", node_key),)
                )
                taken.append(time.perf_counter() - start)
        for server, _ in (open_door, guarded):
            server.stop(grace=None).wait()
    print("| | microseconds |\n|---|---|")
    print(f"| decision | {known / calls * 1e6:.1f} |")
    print(f"| reading the rules anew and the first decision | {fresh / 10 * 1e6:.0f} |")
    print(f"| a heartbeat without the check | {median(seconds[0]) * 1e6:.0f} |")
    print(f"| a heartbeat with it | {median(seconds[1]) * 1e6:.0f} |")


if __name__ == "__main__":
    main()
