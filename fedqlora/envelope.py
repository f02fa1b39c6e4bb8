"""Envelopes: sign, verify, replay window.

Guarantees, each restated by a test in tests/fedqlora/test_envelope.py:

- A verified envelope was signed by the expected key over its version, run, round, site,
  kind, issue number and payload digest; changing any byte of it is refused.
- A reply fits exactly one instruction: it carries the digest of that instruction's header.
- A window admits the instructions of a run in increasing issue order only, also after a
  restart; the newest one may come again, byte for byte the same.

Edge cases: an empty payload is signed like any other; an unknown kind or a header that does
not parse is a SignatureError, for nothing in it can be believed; a version that this side
does not speak is a VersionError, raised only after the signature holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import ConfigError, ReplayError, SignatureError, VersionError
from fedqlora.files import write_durably
from fedqlora.head import Head

VERSION = 1
ANY_SITE = "*"
NO_HEAD = Head()
Instruction = pb.Describe | pb.Train | pb.Evaluate | pb.Confirm | pb.Unmask | pb.Wrap | pb.Decrypt
Answer = (
    pb.Description
    | pb.Update
    | pb.Evaluation
    | pb.Confirmation
    | pb.Unmasking
    | pb.WrappedKey
    | pb.Decryption
)
"""What an instruction that is not refused brings back."""
# Keeps these signatures apart from anything else that the same key may ever sign.
_PREFIX = b"fedqlora envelope\x00"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """An envelope whose signature, addressee and payload digest hold."""

    header: pb.Header
    payload: bytes
    digest: bytes
    """SHA-256 of the header: names this envelope."""

    @property
    def own(self) -> Head:
        """The head of the sender's audit log."""
        return Head(self.header.own_number, self.header.own_head)

    @property
    def seen(self) -> Head:
        """The head of the addressee's audit log that the sender relies on."""
        return Head(self.header.seen_number, self.header.seen_head)


def sign(
    key: Ed25519PrivateKey,
    *,
    run: str,
    round_: int,
    site: str,
    kind: pb.Kind,
    issued: int,
    payload: bytes,
    replies_to: bytes = b"",
    version: int = VERSION,
    own: Head = NO_HEAD,
    seen: Head = NO_HEAD,
) -> bytes:
    """Build and sign an envelope; returns it serialized. Fields: see protocol.proto."""
    header = pb.Header(
        version=version,
        run=run,
        round=round_,
        site=site,
        kind=kind,
        issued=issued,
        payload_digest=hashlib.sha256(payload).digest(),
        replies_to=replies_to,
        own_number=own.number,
        own_head=own.digest,
        seen_number=seen.number,
        seen_head=seen.digest,
    ).SerializeToString(deterministic=True)
    return pb.Envelope(
        header=header, signature=key.sign(_PREFIX + header), payload=payload
    ).SerializeToString()


def verify(data: bytes, key: Ed25519PublicKey, *, kinds: Collection[int]) -> Verified:
    """Open an envelope.

    Args:
        data: the serialized envelope.
        key: the only key that may have signed it.
        kinds: the kinds that make sense here.

    Raises:
        SignatureError: it was not signed by `key`, was altered, or is of another kind.
        VersionError: it is genuine, of a protocol version that this side does not speak.
    """
    try:
        envelope = pb.Envelope.FromString(data)
        key.verify(envelope.signature, _PREFIX + envelope.header)
        header = pb.Header.FromString(envelope.header)
    except (InvalidSignature, DecodeError):
        raise SignatureError(
            "an envelope is not signed by the expected key; compare both sides' key fingerprints"
        ) from None
    if header.version != VERSION:
        raise VersionError(
            f"an envelope speaks protocol version {header.version}, this side speaks {VERSION}; "
            "bring both sides to the same release"
        )
    if header.kind not in kinds:
        raise SignatureError(f"an envelope of kind {header.kind} has no place here; drop it")
    if hashlib.sha256(envelope.payload).digest() != header.payload_digest:
        raise SignatureError("an envelope's payload was altered on the way; send it again")
    return Verified(
        header=header,
        payload=envelope.payload,
        digest=hashlib.sha256(envelope.header).digest(),
    )


def verify_reply(data: bytes, key: Ed25519PublicKey, *, site: str, instruction: bytes) -> Verified:
    """Open a site's reply to one instruction.

    Args:
        data: the serialized reply.
        key: the site's public signing key.
        site: who has to have signed it.
        instruction: digest of the header of the instruction that was sent.

    Raises:
        SignatureError: also if the reply is another site's or answers another instruction.
        VersionError: as `verify`.
    """
    kinds = (
        *(pb.DESCRIPTION, pb.UPDATE, pb.CONFIRMATION, pb.UNMASKING),
        *(pb.WRAPPED_KEY, pb.DECRYPTION, pb.EVALUATION, pb.REFUSAL),
    )
    reply = verify(data, key, kinds=kinds)
    if reply.header.site != site:
        raise SignatureError(f"a reply is in the name of {reply.header.site[:40]}, not {site}")
    if reply.header.replies_to != instruction:
        raise SignatureError(f"site {site} answered another instruction than the one sent; drop it")
    return reply


def instruction_digest(data: bytes) -> bytes:
    """SHA-256 of an envelope's header: what a reply to it names. Nothing is verified."""
    return hashlib.sha256(_parse(data).header).digest()


def claimed_header(data: bytes) -> pb.Header:
    """An envelope's header before verification: believe nothing in it.

    Raises:
        SignatureError: it does not parse.
    """
    try:
        return pb.Header.FromString(_parse(data).header)
    except DecodeError:
        raise SignatureError("an envelope's header does not parse; send it again") from None


def _parse(data: bytes) -> pb.Envelope:
    try:
        return pb.Envelope.FromString(data)
    except DecodeError:
        raise SignatureError(
            "bytes that should be an envelope do not parse; send it again"
        ) from None


class ReplayWindow:
    """The newest instruction of each run, kept in a file so that a restart forgets nothing.

    Args:
        folder: where `window.json` and the newest reply of each run live; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "window.json"
        try:
            self._newest: dict[str, dict[str, str | int]] = json.loads(self._path.read_text())
        except FileNotFoundError:
            self._newest = {}
        except ValueError:
            raise ConfigError(
                f"{self._path} is damaged; restore it from a backup, for without it "
                "replayed instructions would be accepted"
            ) from None

    def admit(self, instruction: Verified) -> bytes | None:
        """Accept an instruction, durably, before it is carried out.

        Returns:
            None if it has to be carried out: it is new, or the newest one of its run whose
            reply was never finished. The stored reply if it was carried out before.

        Raises:
            ReplayError: it is older than the newest one, or another one with its number.
        """
        header = instruction.header
        newest = self._newest.get(header.run)
        digest = instruction.digest.hex()
        if newest is not None and newest["digest"] == digest:
            try:
                return self._reply_path(header.run).read_bytes()
            except FileNotFoundError:
                return None
        if newest is not None and header.issued <= int(newest["issued"]):
            raise ReplayError(
                f"an instruction for round {header.round} of run {header.run} is older than the "
                "newest one; it was recorded and not carried out"
            )
        self._reply_path(header.run).unlink(missing_ok=True)
        self._newest[header.run] = {"issued": header.issued, "digest": digest}
        write_durably(self._path, json.dumps(self._newest).encode())
        return None

    def keep(self, instruction: Verified, reply: bytes) -> None:
        """Store the reply to the newest instruction of its run, before it leaves."""
        write_durably(self._reply_path(instruction.header.run), reply)

    def _reply_path(self, run: str) -> Path:
        # A digest, since a run's name comes from outside.
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()}.reply"
