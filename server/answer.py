"""Answer: what came back from one site, verified and parsed, or why there is nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from fedqlora import protocol_pb2 as pb
from fedqlora.envelope import verify_reply
from fedqlora.errors import SignatureError

LATE = "late"
LOST = "lost"
REFUSED = "refused"
INVALID = "invalid"

SiteAnswer = (
    pb.Description | pb.Update | pb.Confirmation | pb.Unmasking | pb.WrappedKey | pb.Decryption
)
"""What a site says unless it refuses."""

_BODIES: dict[int, type[SiteAnswer | pb.Refusal]] = {
    pb.DESCRIPTION: pb.Description,
    pb.UPDATE: pb.Update,
    pb.CONFIRMATION: pb.Confirmation,
    pb.UNMASKING: pb.Unmasking,
    pb.WRAPPED_KEY: pb.WrappedKey,
    pb.DECRYPTION: pb.Decryption,
    pb.REFUSAL: pb.Refusal,
}
_EXPECTED: dict[int, int] = {
    pb.DESCRIBE: pb.DESCRIPTION,
    pb.TRAIN: pb.UPDATE,
    pb.CONFIRM: pb.CONFIRMATION,
    pb.UNMASK: pb.UNMASKING,
    pb.WRAP: pb.WRAPPED_KEY,
    pb.DECRYPT: pb.DECRYPTION,
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back from one node.

    Attributes:
        node: Flower's node id.
        site: the site asked, or "*" where it is not known yet.
        message: what the site signed; None if `failure` says why there is none.
        failure: "" or one of late, lost, refused, invalid.
        reason: one sentence about the failure.
        sent_bytes: size of the instruction.
        received_bytes: size of the reply.
        stale: whether it answers the round before.
        instruction: digest of the instruction's header that it answers.
    """

    node: int
    site: str
    message: SiteAnswer | None = None
    failure: str = ""
    reason: str = ""
    sent_bytes: int = 0
    received_bytes: int = 0
    stale: bool = False
    instruction: bytes = b""

    @property
    def facts(self) -> dict[str, Any]:
        """What a round records of it before its content is looked at."""
        return {
            "outcome": self.failure or "used",
            "bytes_down": self.sent_bytes,
            "bytes_up": self.received_bytes,
            **({"stale": 1} if self.stale else {}),
        }


def open_reply(
    data: bytes, key: Ed25519PublicKey, *, site: str, instruction: bytes, asked: pb.Kind
) -> tuple[pb.Header, SiteAnswer | pb.Refusal]:
    """Verify a reply and parse its payload, of which no copy outlives the call.

    Args:
        data: the serialized envelope.
        key: the site's public signing key.
        site: who has to have signed it.
        instruction: digest of the instruction's header.
        asked: the instruction's kind.

    Raises:
        EnvelopeError: see envelope.verify_reply; also a reply of a kind that was not asked for.
    """
    reply = verify_reply(data, key, site=site, instruction=instruction)
    if reply.header.kind not in (_EXPECTED[asked], pb.REFUSAL):
        raise SignatureError(f"site {site} answered with another kind of reply than asked for")
    try:
        return reply.header, _BODIES[reply.header.kind].FromString(reply.payload)
    except DecodeError:
        raise SignatureError(
            f"site {site}'s reply does not parse; bring it to our release"
        ) from None
