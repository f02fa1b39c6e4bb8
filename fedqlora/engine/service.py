"""The gRPC service on a unix socket that a trainer and the evaluator share.

One exchange: verify -> admit -> carry out -> store -> sign. Whatever goes wrong inside
leaves as a signed refusal with a code and a fixed sentence; where it happened stays in this
process's log. The text of an error that is not ours is in neither: it could quote a record.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedqlora import protocol_pb2 as pb
from fedqlora import protocol_pb2_grpc
from fedqlora.audit import AuditLog
from fedqlora.config import RunConfig, validate
from fedqlora.envelope import (
    ANY_SITE,
    Answer,
    Instruction,
    ReplayWindow,
    Verified,
    claimed_header,
    instruction_digest,
    sign,
    verify,
)
from fedqlora.errors import (
    AuditError,
    ConfigError,
    EnvelopeError,
    FedqloraError,
    HistoryError,
    ModelError,
    PolicyRefusal,
    PrivacyError,
    SecureAggregationError,
    SignatureError,
    UpdateError,
)
from fedqlora.head import Head
from fedqlora.keys import load_public_key, load_signing_key

log = logging.getLogger("fedqlora")

# Only these speak of the coordinator's own inputs, so only their sentences may leave a site.
SAYABLE: tuple[type[FedqloraError], ...] = (
    PolicyRefusal,
    PrivacyError,
    ConfigError,
    ModelError,
    EnvelopeError,
    UpdateError,
    HistoryError,
    SecureAggregationError,
)
_INSTRUCTIONS: dict[int, type[Instruction]] = {
    pb.DESCRIBE: pb.Describe,
    pb.TRAIN: pb.Train,
    pb.EVALUATE: pb.Evaluate,
    pb.CONFIRM: pb.Confirm,
    pb.UNMASK: pb.Unmask,
    pb.WRAP: pb.Wrap,
    pb.DECRYPT: pb.Decrypt,
}
_ANSWERS: dict[int, pb.Kind] = {
    pb.DESCRIBE: pb.DESCRIPTION,
    pb.TRAIN: pb.UPDATE,
    pb.EVALUATE: pb.EVALUATION,
    pb.CONFIRM: pb.CONFIRMATION,
    pb.UNMASK: pb.UNMASKING,
    pb.WRAP: pb.WRAPPED_KEY,
    pb.DECRYPT: pb.DECRYPTION,
}


class Worker(Protocol):
    """What carries instructions out; a missing method's kind is refused."""

    def perform(self, header: pb.Header, config: RunConfig, body: Instruction) -> Answer:
        """Carry out one verified instruction and return what is to be signed."""

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        """Record that an instruction was refused."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who signs here, and whose instructions count.

    Attributes:
        name: the site's name.
        key: its signing key.
        coordinator: the only key whose instructions are carried out.
    """

    name: str
    key: Ed25519PrivateKey
    coordinator: Ed25519PublicKey

    @classmethod
    def load(cls, name: str, folder: Path) -> Identity:
        """Read signing.key and coordinator.pub of a folder.

        Raises:
            ConfigError: one of them is missing or is no Ed25519 key.
        """
        return cls(
            name=name,
            key=load_signing_key(folder / "signing.key"),
            coordinator=load_public_key(folder / "coordinator.pub"),
        )


class Service(protocol_pb2_grpc.TrainerServicer):
    """Turns instruction envelopes into reply envelopes, one at a time.

    Args:
        identity: whose service this is.
        state: folder that keeps the replay window.
        worker: carries out what was admitted.
        sayable: errors whose sentence is sent; of others only the code is.
        audit: the site's log, whose head every reply carries; the evaluator keeps none.
    """

    def __init__(
        self,
        identity: Identity,
        state: Path,
        worker: Worker,
        sayable: tuple[type[FedqloraError], ...] = SAYABLE,
        audit: AuditLog | None = None,
    ) -> None:
        self._identity = identity
        self._window = ReplayWindow(state)
        self._worker = worker
        self._sayable = sayable
        self._audit = audit
        self._lock = threading.Lock()

    def Exchange(self, request: pb.Envelope, context: Any) -> pb.Envelope:  # noqa: ARG002, D102
        return pb.Envelope.FromString(self.exchange(request.SerializeToString()))

    def exchange(self, data: bytes) -> bytes:
        """Carry out one instruction and return the signed reply; never raises for bad input."""
        # Two deliveries of one instruction must not train twice at once: the second waits
        # and gets the first one's stored reply.
        with self._lock:
            try:
                instruction = verify(data, self._identity.coordinator, kinds=_INSTRUCTIONS)
            except EnvelopeError as error:
                # Nothing in the header is believed; it only addresses the refusal.
                try:
                    return self._refuse(claimed_header(data), instruction_digest(data), error)
                except SignatureError:
                    return self._refuse(pb.Header(), b"", error)
            header = instruction.header
            try:
                self._check_addressee(header)
                if self._audit is not None:
                    self._audit.check(instruction.seen, "the coordinator")
                stored = self._window.admit(instruction)
                if stored is not None:
                    log.info(
                        "round %s of run %s: stored reply sent again", header.round, header.run
                    )
                    return stored
                kind, payload = self._carry_out(instruction)
                reply = self._sign(header, kind, payload, instruction.digest)
                self._window.keep(instruction, reply)
            except Exception as error:
                return self._refuse(header, instruction.digest, error)
            return reply

    def _check_addressee(self, header: pb.Header) -> None:
        """Refuse what is meant for another site; only DESCRIBE may be for any."""
        anyone = header.site == ANY_SITE and header.kind == pb.DESCRIBE
        if header.site != self._identity.name and not anyone:
            raise SignatureError(
                f"an instruction for {header.site[:40]} reached {self._identity.name}; drop it"
            )

    def _carry_out(self, instruction: Verified) -> tuple[pb.Kind, Message]:
        """Parse the payload, validate its configuration and let the worker perform it."""
        header = instruction.header
        try:
            body = _INSTRUCTIONS[header.kind].FromString(instruction.payload)
        except DecodeError:
            raise SignatureError("an instruction's payload does not parse; send it again") from None
        config = parse_config(body.config)
        return _ANSWERS[header.kind], self._worker.perform(header, config, body)

    def _refuse(self, header: pb.Header, digest: bytes, error: Exception) -> bytes:
        """Log an error and sign what may be said of it."""
        if isinstance(error, FedqloraError):
            log.error("refused: %s", error)
        else:
            log.error("failed while carrying out an instruction:\n%s", locate(error))
        sentence = "it could not be carried out; the log there says why"
        if isinstance(error, self._sayable):
            sentence = str(error)
        refusal = pb.Refusal(
            code=type(error).__name__ if isinstance(error, FedqloraError) else "InternalError",
            rule=error.rule if isinstance(error, FedqloraError) else "",
            sentence=sentence,
        )
        self._worker.refused(header, refusal)
        return self._sign(header, pb.REFUSAL, refusal, digest)

    def _sign(self, header: pb.Header, kind: pb.Kind, payload: Message, digest: bytes) -> bytes:
        own = Head()
        if self._audit is not None:
            own = self._audit.head
            try:
                self._audit.sign_head()
            except AuditError as error:
                # A refusal leaves all the same: the coordinator has to learn of it.
                if kind != pb.REFUSAL:
                    raise
                log.error("%s", error)
        return sign(
            self._identity.key,
            run=header.run,
            round_=header.round,
            site=self._identity.name,
            kind=kind,
            issued=header.issued,
            payload=payload.SerializeToString(),
            replies_to=digest,
            own=own,
            seen=Head(header.own_number, header.own_head),
        )


def locate(error: BaseException) -> str:
    """Where an error that is not ours came from, and its kind: all but its text.

    Libraries quote what they were given, and here that may be a record.
    """
    lines = traceback.format_list(traceback.extract_tb(error.__traceback__))
    return f"{''.join(lines)}{type(error).__module__}.{type(error).__qualname__}"


def parse_config(text: str) -> RunConfig:
    """The run's configuration out of an instruction.

    Raises:
        ConfigError: it is not JSON, or a key or value is wrong (an older site's release
            does not know a newer key: it says so instead of ignoring it).
    """
    try:
        values = json.loads(text)
    except ValueError:
        raise ConfigError("the instruction's configuration is not JSON; send it again") from None
    return validate(RunConfig, values, "the instruction's configuration")


def serve(service: Service, socket: Path) -> NoReturn:
    """Serve on a unix socket until SIGTERM or SIGINT, with the standard health service.

    Then the process ends, with status 0, also in the middle of a round: everything that is kept
    is written whole at once, and the same instruction is carried out again after a restart.

    Args:
        service: what answers.
        socket: as `listen`.

    Raises:
        ConfigError: as `listen`.
    """
    # A handler may interrupt itself, which an event's lock does not survive: a pipe has none.
    told, tell = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(tell, b"."))
    server = listen(service, socket)
    log.info("serving on %s", socket.name)
    os.read(told, 1)
    server.stop(grace=2).wait()
    # A thread that trains would hold an ordinary exit back until its round is over.
    logging.shutdown()
    os._exit(0)


def listen(service: Service, socket: Path) -> grpc.Server:
    """Answer on a unix socket, in threads of this process, until the server is stopped.

    Args:
        service: what answers.
        socket: path of the socket; a stale one is replaced; mode 0660.

    Raises:
        ConfigError: the path is too long for a unix socket or its folder is missing.
    """
    if len(os.fsencode(socket)) > 100:
        raise ConfigError(f"socket path {socket} is longer than 100 bytes; choose a shorter one")
    if not socket.parent.is_dir():
        raise ConfigError(f"folder {socket.parent} of the socket does not exist; make it")
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=unlimited)
    protocol_pb2_grpc.add_TrainerServicer_to_server(service, server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    old_mask = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix:{socket}")
    finally:
        os.umask(old_mask)
    server.start()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    return server
