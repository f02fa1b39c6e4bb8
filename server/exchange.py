"""Exchange: one signed instruction to each of some sites, verified replies as they arrive.

The only place that talks to Flower's Grid. Flower's own `send_and_receive` polls every 3 s
and holds all replies until the last; this one polls faster and hands over one at a time
(docs/adr/0005-polling.md).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import http_grid

from fedqlora import protocol_pb2 as pb
from fedqlora.audit import digest_of
from fedqlora.envelope import ANY_SITE, claimed_header, instruction_digest, sign
from fedqlora.errors import EnvelopeError, FederationError, HistoryError, SignatureError
from fedqlora.head import Head
from server.answer import INVALID, LATE, LOST, REFUSED, Answer, open_reply
from server.centre_log import CentreLog

log = logging.getLogger("server")

# Shared by all sites that have not answered: few are asked often, many do not flood the SuperLink.
LOOKS_PER_SECOND = 20
# A look costs the SuperLink 6 ms: who trains for minutes need not be asked twenty times a second.
LONGEST_PAUSE_SECONDS = 1.0
# Looking sooner, the grid finds replies that are still arriving; Flower waits 1, 2, 4 s then.
FIRST_RETRY_SECONDS = 0.1
vars(http_grid)["pull_objects"] = functools.partial(
    vars(http_grid)["pull_objects"], initial_backoff=FIRST_RETRY_SECONDS
)


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """An instruction that is not answered yet."""

    node: int
    site: str
    digest: bytes
    size: int
    seen: Mapping[str, Head]
    stale: bool = False


class Exchange:
    """Signs instructions of one run and verifies the replies.

    Args:
        grid: Flower's connection to the nodes.
        key: the coordinator's signing key.
        sites: each site's public signing key, from the roster.
        run: the run's name in every envelope.
        issued: the highest issue number that this run has used before.
        history: the centre's audit log, and what it knows of the sites' logs.
        app: digest of the app that runs here; empty in a simulation, where none is packed.
    """

    def __init__(
        self,
        grid: Grid,
        key: Ed25519PrivateKey,
        sites: Mapping[str, Ed25519PublicKey],
        run: str,
        issued: int,
        history: CentreLog,
        app: str = "",
    ) -> None:
        self._grid = grid
        self._key = key
        self._sites = sites
        self.run = run
        self._overdue: dict[str, _Sent] = {}
        self.issued = issued
        self.history = history
        self.app = app

    def nodes(self) -> set[int]:
        """Nodes that are connected now.

        Raises:
            FederationError: the SuperLink is gone (Flower's own retries are over).
        """
        with _superlink():
            return set(self._grid.get_node_ids())

    def key_of(self, site: str) -> Ed25519PublicKey:
        """The public signing key of a site of the roster."""
        return self._sites[site]

    def sign(self, kind: pb.Kind, site: str, round_: int, payload: bytes) -> bytes:
        """Sign an instruction with the next issue number."""
        # A clock makes numbers grow across restarts, the counter when the clock does not.
        self.issued = max(time.time_ns(), self.issued + 1)
        return sign(
            self._key,
            run=self.run,
            round_=round_,
            site=site,
            kind=kind,
            issued=self.issued,
            payload=payload,
            own=self.history.head,
            seen=self.history.newest(site),
        )

    def judged(self, round_: int, site: str, outcome: str) -> None:
        """Put on record what became of a site's answer: used, or why not."""
        self.history.record("judged", run=self.run, round=round_, site=site, outcome=outcome)

    def aggregated(self, round_: int, sites: int, adapter: bytes) -> None:
        """Put on record what a round has made of the updates, and sign the log's head."""
        digest = digest_of(adapter)
        self.history.record("aggregated", run=self.run, round=round_, sites=sites, adapter=digest)
        self.history.sign_head()

    def ask(
        self,
        addressees: Mapping[int, str],
        kind: pb.Kind,
        round_: int,
        payload: bytes | Mapping[str, bytes],
        deadline_seconds: float,
        *,
        use_late: bool = False,
    ) -> Iterator[Answer]:
        """Send one instruction to each node and yield an answer for every one of them.

        With `use_late` a node that was late last time is not asked now: the answer to that
        instruction is waited for once more and yielded as a stale one. Who is late in two calls is
        not waited for a third time.

        Args:
            addressees: node id -> site name, or "*" for a node not known yet.
            kind: any but EVALUATE.
            round_: the round.
            payload: the serialized instruction, one for all or one for each site by name.
            deadline_seconds: nodes that have not answered by then yield a `late` answer.
            use_late: see above; what was late is forgotten when this process ends.

        Raises:
            FederationError: the SuperLink is gone.
        """
        deadline = time.monotonic() + deadline_seconds
        pending: dict[str, _Sent] = {}
        if use_late:
            pending = {
                name: replace(sent, stale=True, size=0) for name, sent in self._overdue.items()
            }
            self._overdue = {}
        busy = {sent.node for sent in pending.values()}
        # Flower drops a message, and a reply to it, at the end of its time to live.
        lifetime = deadline_seconds * (2 if use_late else 1) + 60
        for node, site in addressees.items():
            if node in busy:
                continue
            own = payload if isinstance(payload, bytes) else payload[site]
            envelope = self.sign(kind, site, round_, own)
            digest = instruction_digest(envelope)
            seen = self.history.instructed(envelope)
            array = Array(np.frombuffer(envelope, dtype=np.uint8))
            content = RecordDict({"envelope": ArrayRecord({"envelope": array})})
            message = Message(content, node, "query", ttl=lifetime)
            with _superlink():
                identifiers = [name for name in self._grid.push_messages([message]) if name]
            if not identifiers:
                yield Answer(
                    node=node, site=site, failure=LOST, reason="SuperLink refused the message"
                )
                continue
            pending[identifiers[0]] = _Sent(
                node=node, site=site, digest=digest, size=len(envelope), seen=seen
            )
            del own, envelope, array, content, message
        # Sent: what follows may take hours, and an adapter is large.
        del payload
        began = time.monotonic()
        while pending:
            for identifier, sent in list(pending.items()):
                # One id at a time: a pull of all would hold all their replies in memory.
                with _superlink():
                    messages = list(self._grid.pull_messages([identifier]))
                for message in messages:
                    del pending[identifier]
                    yield replace(self._open(message, kind, sent), stale=sent.stale)
            if pending and time.monotonic() > deadline:
                break
            if pending:
                slower = min(LONGEST_PAUSE_SECONDS, (time.monotonic() - began) / 20)
                time.sleep(max(len(pending) / LOOKS_PER_SECOND, slower))
        if use_late:
            self._overdue = {name: sent for name, sent in pending.items() if not sent.stale}
        for sent in pending.values():
            reason = f"no reply within {deadline_seconds:g} s"
            if sent.stale:
                reason += " of this round either; it is not waited for any longer"
            yield Answer(
                node=sent.node,
                site=sent.site,
                failure=LATE,
                reason=reason,
                sent_bytes=sent.size,
                stale=sent.stale,
            )

    def _open(self, message: Message, asked: pb.Kind, sent: _Sent) -> Answer:
        """Verify and parse one reply message."""
        node, site, size = sent.node, sent.site, sent.size
        if message.has_error():
            reason = f"Flower error {message.error.code}: {str(message.error.reason)[:200]}"
            return Answer(node=node, site=site, failure=LOST, reason=reason, sent_bytes=size)
        data = b""
        try:
            data = message.content.array_records["envelope"]["envelope"].numpy().tobytes()
            signer = site if site != ANY_SITE else claimed_header(data).site
            if signer not in self._sites:
                raise SignatureError(
                    f"no site named {signer[:40]} is in the roster; admit it first"
                )
            header, body = open_reply(
                data, self._sites[signer], site=signer, instruction=sent.digest, asked=asked
            )
            self.history.replied(
                header, body, sent.seen.get(signer, Head()), confirmed=site == signer
            )
        except (EnvelopeError, HistoryError, KeyError, ValueError) as error:
            ours = isinstance(error, EnvelopeError | HistoryError)
            reason = str(error) if ours else "it is not an envelope"
            log.warning("reply from %s refused: %s", site, reason)
            return Answer(
                node=node,
                site=site,
                failure=INVALID,
                reason=reason,
                sent_bytes=size,
                received_bytes=len(data),
            )
        if isinstance(body, pb.Refusal):
            return Answer(
                node=node,
                site=signer,
                failure=REFUSED,
                reason=f"{body.code}: {body.sentence}",
                sent_bytes=size,
                received_bytes=len(data),
            )
        return Answer(
            node=node,
            site=signer,
            message=body,
            sent_bytes=size,
            received_bytes=len(data),
            instruction=sent.digest,
        )


@contextlib.contextmanager
def _superlink() -> Iterator[None]:
    """Turn Flower's transport errors into ours."""
    try:
        yield
    except httpx.HTTPError as error:
        raise FederationError(
            f"the SuperLink does not answer ({type(error).__name__}); start it, then resume the run"
        ) from error
