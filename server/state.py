"""State: what the SuperLink knows of nodes and runs, without Flower's message types."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.serde import user_config_from_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedqlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the SuperLink knows of a run."""

    run_id: int
    """Flower's id of the run."""
    folder: str
    """The run folder's name, from the run configuration's key `run`; empty for other apps."""
    status: str
    """`pending`, `starting`, `running` or `finished`."""
    outcome: str
    """`completed`, `failed` or `stopped` once finished, else empty."""
    details: str
    """Flower's reason for a failure, may be empty."""

    @property
    def active(self) -> bool:
        """Whether the run has not ended."""
        return self.status != "finished"

    @classmethod
    def read(cls, run: Run) -> RunState:
        """One run of the SuperLink's list."""
        return cls(
            run_id=run.run_id,
            folder=str(user_config_from_proto(run.override_config).get("run", "")),
            status=run.status.status,
            outcome=run.status.sub_status,
            details=run.status.details,
        )


@dataclass(frozen=True, kw_only=True)
class Node:
    """A SuperNode whose key is registered."""

    name: str
    """The site's name, as registered."""
    key: bytes
    """Its public key (PEM)."""
    status: str
    """`registered` (never seen), `online`, `offline` or `unregistered`."""
    since: str
    """When it became that (ISO 8601, UTC); for a node that died, when its heartbeat ran out."""

    @classmethod
    def read(cls, node: NodeInfo) -> Node:
        """One node of the SuperLink's list."""
        changed = {
            "online": node.last_activated_at,
            "offline": node.last_deactivated_at,
            "unregistered": node.unregistered_at,
        }
        return cls(
            name=node.name,
            key=node.public_key,
            status=node.status,
            since=changed.get(node.status, node.registered_at),
        )


def read_node_key(line: bytes, where: str) -> bytes:
    """A SuperNode's public key, one line in OpenSSH format, as the SuperLink keeps it (PEM).

    Args:
        line: the line.
        where: where it was read, for the message.

    Raises:
        ConfigError: it is not an elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(line)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{where} holds no elliptic-curve key: make a new one.")
    return public_key_to_bytes(key)
