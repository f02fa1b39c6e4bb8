"""History: the centre's audit log, and what it knows of every site's log.

One file, `audit.jsonl` beside the run folders, goes on over all runs. Its events:

    started       a run began, or goes on; digest of its configuration
    instructed    an instruction was signed: to whom, digest, which head of the site it carries
    replied       a site's reply was verified: digest, and the head of the site's log
    contradicted  a site's head does not fit what was seen before; the reply is not used
    judged        what became of a site's update
    aggregated    a round's adapter: digest, and how many sites
    ended         how a run ended
    forgotten     somebody decided that a site starts a new log

Guarantees: a site whose log was cut off or written anew cannot have another update used. It is
told the newest head that it confirmed, and an honest trainer refuses what its log lacks; a reply
whose head is older than that, or another one with a number already seen, is refused here.

Edge cases: a description is asked for without a head, for the asker does not know yet who
answers; its head is recorded and held against what was seen, but confirms nothing. Replies of two
runs at once may overtake each other: each is held to the head of its own instruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from fedqlora import protocol_pb2 as pb
from fedqlora.audit import AuditLog, digest_of
from fedqlora.config import RunConfig
from fedqlora.envelope import claimed_header, instruction_digest
from fedqlora.errors import ConfigError, HistoryError
from fedqlora.head import Head, head_facts

FILE = "audit.jsonl"


class CentreLog:
    """The centre's audit log, opened.

    Args:
        runs: folder of run folders, where the log lies.
        key: the coordinator's signing key.

    Raises:
        AuditError: the log was changed, or cannot be written.
    """

    def __init__(self, runs: Path, key: Ed25519PrivateKey) -> None:
        self._log = AuditLog(runs / FILE, key)
        self._newest: dict[str, Head] = {}
        self._seen: dict[tuple[str, int], bytes] = {}
        for line in self._log.lines():
            if line["event"] == "replied":
                head = Head(line["site_number"], bytes.fromhex(line["site_hash"]))
                self._remember(line["site"], head, confirmed=line["confirmed"] == 1)
            elif line["event"] == "forgotten":
                self._forget(line["site"])

    @property
    def head(self) -> Head:
        """The head of the centre's own log."""
        return self._log.head

    def newest(self, site: str) -> Head:
        """The newest head that a site has confirmed; number 0 if none."""
        return self._newest.get(site, Head())

    @contextmanager
    def run(self, name: str, config: RunConfig) -> Iterator[None]:
        """Record a run's start and its end, however it ends, and sign the head.

        Raises:
            AuditError: a line cannot be written.
        """
        configuration = digest_of(config.model_dump_json().encode())
        self._log.append("started", run=name, config=configuration)
        outcome = "failed"
        try:
            yield
            outcome = "finished"
        finally:
            self._log.append("ended", run=name, outcome=outcome)
            self._log.sign_head()

    def record(self, event: str, **facts: str | int) -> None:
        """Append a line; see the events above.

        Raises:
            AuditError: it cannot be written.
        """
        self._log.append(event, **facts)

    def sign_head(self) -> None:
        """Sign the log's head, at the end of each round and of a run."""
        self._log.sign_head()

    def instructed(self, envelope: bytes) -> Mapping[str, Head]:
        """Record an instruction before it is sent; returns what is known of all sites then."""
        header = claimed_header(envelope)
        self._log.append(
            "instructed",
            **_place(header),
            site=header.site,
            bytes_out=len(envelope),
            envelope=instruction_digest(envelope).hex(),
            payload=header.payload_digest.hex(),
            **head_facts("seen", Head(header.seen_number, header.seen_head)),
        )
        return dict(self._newest)

    def replied(
        self,
        header: pb.Header,
        body: Message,
        expected: Head,
        *,
        confirmed: bool,
    ) -> None:
        """Record a verified reply, and hold its head against what is known of the site's log.

        Args:
            header: the reply's.
            body: its payload.
            expected: what was known when the instruction was sent.
            confirmed: the instruction carried `expected`, so an honest trainer has checked it.

        Raises:
            HistoryError: the site's log was cut off or written anew; the reply cannot be used.
            AuditError: the line cannot be written.
        """
        site, head = header.site, Head(header.own_number, header.own_head)
        refusal = body if isinstance(body, pb.Refusal) else None
        known = self._seen.get((site, head.number), head.digest)
        reason = ""
        if refusal is not None and refusal.rule == HistoryError.rule:
            reason = f"site {site}'s audit log lacks line {expected.number}, which it had signed"
        elif head.number < expected.number or known != head.digest:
            reason = (
                f"site {site} signed line {head.number} of its audit log, which does not fit what "
                f"it had signed before (line {max(head.number, expected.number)})"
            )
        elif head.number == 0 and refusal is None:
            reason = f"site {site} signed no head of its audit log"
        facts = {**_place(header), "site": site, **head_facts("site", head)}
        if reason:
            self._log.append("contradicted", **facts)
            raise HistoryError(
                f"{reason}; find out what happened there, then `python -m server forget {site}` "
                "lets it start a new log"
            )
        # What was refused was not checked against the head that it carried, or not recorded.
        confirmed = refusal is None and (confirmed or site not in self._newest)
        self._log.append(
            "replied",
            **facts,
            confirmed=int(confirmed),
            bytes_in=header.ByteSize() + body.ByteSize(),
            payload=header.payload_digest.hex(),
        )
        self._remember(site, head, confirmed=confirmed)

    def forget(self, site: str) -> str:
        """Let a site start a new audit log; both logs show that this was decided.

        Returns:
            One sentence about what was forgotten.

        Raises:
            ConfigError: nothing is known of such a site.
        """
        known = self.newest(site)
        if known.number == 0:
            raise ConfigError(f"no audit log of a site {site} is known; check its name")
        self._log.append("forgotten", site=site, **head_facts("site", known))
        self._log.sign_head()
        self._forget(site)
        return f"site {site} may start a new audit log; the old one ended at line {known.number}"

    def _remember(self, site: str, head: Head, *, confirmed: bool) -> None:
        if head.number == 0:
            return
        self._seen[site, head.number] = head.digest
        if confirmed and head.number > self.newest(site).number:
            self._newest[site] = head

    def _forget(self, site: str) -> None:
        self._newest.pop(site, None)
        self._seen = {key: digest for key, digest in self._seen.items() if key[0] != site}


def _place(header: pb.Header) -> dict[str, str | int]:
    """Which envelope a line is about."""
    return {"run": header.run, "round": header.round, "kind": pb.Kind.Name(header.kind)}
