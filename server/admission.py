"""Admission: which site may call the Fleet API, decided anew for every single call.

TLS asks once per connection whether a certificate chains to `ca.crt`; a revoked site would stay
for as long as its connection does, and come back by resuming it. So every call is checked against
what lies in the SuperLink's key folder at that moment (docs/adr/0007-admission.md).

Guarantees, for each call that reaches Flower:

- the certificate was issued by an authority in `ca.crt`, is valid now, and no revocation list in
  `crl.pem` names its serial number;
- its key belongs to a site of the roster that the coordinator signed, and it names that site alone;
- the SuperNode key that signs the call is the same site's; that the signature is good is checked
  by Flower, after this.

Edge cases: a change on the disk counts within `LOOK_SECONDS`, and at once for whom it lets in;
files that do not pass the checks change nothing and are logged. An expired revocation list goes on
revoking and closes no door: the roster is what lets a site in, and whoever could withhold a newer
list could write the roster's folder too. A refused call's request has been received, but
nothing has looked at it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from flwr.common.constant import PUBLIC_KEY_HEADER
from flwr.common.constant import TIMESTAMP_HEADER as SENT

from fedqlora.credentials import NOT_ADMITTED
from fedqlora.followed import Followed
from server.rules import FILES, Rules, load_rules

logger = logging.getLogger("server")

LOOK_SECONDS = 1.0
"""Time between two looks at the key folder."""

REPEAT_SECONDS = 60.0
"""Time between two lines in the log about the same refusal."""

REMIND_SECONDS = 86400.0
"""Time between two lines about a revocation list that has ended."""

_LIST_ENDED = "A list in crl.pem has ended and goes on revoking: have a new one written."
_MOST_REMEMBERED = 4096  # refusals; nobody fills the memory


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The newest call of a site that was admitted."""

    time: float
    """When it came, in seconds since 1970."""
    sent: str
    """When the site's clock says that it was sent (ISO 8601); empty if it does not say."""
    until: float
    """When the site's certificate expires, in seconds since 1970."""


class Admission(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Lets a call pass to Flower only if the newest rules of the key folder admit it."""

    def __init__(self, folder: Path) -> None:
        """Loads the first rules.

        Raises:
            ConfigError: they do not pass the checks.
        """
        self._rules = Followed(folder, FILES, load_rules, Rules.describe, LOOK_SECONDS)
        self._quiet_until: dict[str, float] = {}
        self.seen: dict[str, Seen] = {}
        """The newest admitted call of each site, for the metrics."""

    @property
    def rules(self) -> Rules:
        """The newest rules that passed the checks."""
        return self._rules.follow()

    @property
    def failures(self) -> int:
        """How often newer files did not pass the checks."""
        return self._rules.failures

    @property
    def problem(self) -> str | None:
        """What is wrong with the newest files; None while all is well."""
        rules = self._rules.follow()
        if self._rules.problem is None and time.time() > rules.lists_end:
            return _LIST_ENDED
        return self._rules.problem

    def install(self) -> None:
        """Puts this before all other interceptors of every gRPC server that is made from now on.

        Flower has no setting for it, but makes its Fleet server with `grpc.server`, the only
        name that is replaced; `tests/launchers/test_admission.py` fails when that changes.
        """
        original = grpc.server

        def replaced(*arguments: Any, **named: Any) -> grpc.Server:
            named["interceptors"] = [self, *(named.get("interceptors") or ())]
            return original(*arguments, **named)

        grpc.server = replaced

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Puts the check before the method; a method with a stream, which Fleet lacks, is refused.

        Two SuperNode keys in one call count as none: which one Flower checks is its own affair.
        """
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        keys = [
            value
            for name, value in handler_call_details.invocation_metadata
            if name == PUBLIC_KEY_HEADER
        ]
        sent = next((v for n, v in handler_call_details.invocation_metadata if n == SENT), "")
        node_key = keys[0] if len(keys) == 1 and isinstance(keys[0], bytes) else b""
        answer = handler.unary_unary

        def check_first(request: Any, context: grpc.ServicerContext) -> Any:
            shown: Any = context.auth_context().get("x509_pem_cert") or [b""]  # the stubs err
            if answer is None or not self.admits(shown[0], node_key, str(sent)):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, NOT_ADMITTED)
            return answer(request, context)

        return grpc.unary_unary_rpc_method_handler(
            check_first, handler.request_deserializer, handler.response_serializer
        )

    def admits(self, certificate: bytes, node_key: bytes, sent: str = "") -> bool:
        """Whether a call with this certificate and this SuperNode key (both PEM) may go on.

        Args:
            certificate: that of the connection.
            node_key: what the call claims to be signed with.
            sent: when it was sent by the site's clock, noted for the metrics.
        """
        now = time.time()
        rules = self._rules.follow()
        if now > rules.lists_end:
            self._warn(_LIST_ENDED, now, REMIND_SECONDS)
        refused = rules.refuse(certificate, node_key, now)
        if refused is not None:
            # A site may be quicker than the last look: nobody is refused by rules of yesterday.
            rules = self._rules.follow(at_once=True)
            refused = rules.refuse(certificate, node_key, now)
        if refused is None:
            verdict = rules.known.get(certificate)  # another thread may just have cleared it
            if verdict is not None:
                self.seen[verdict.site] = Seen(time=now, sent=sent, until=verdict.until)
            return True
        self._warn(
            f"Refusing the calls of site {refused.site}: {refused.reason}.", now, REPEAT_SECONDS
        )
        return False

    def _warn(self, sentence: str, now: float, pause_seconds: float) -> None:
        """Logs a sentence unless it was logged a short while ago."""
        if now >= self._quiet_until.get(sentence, 0.0):
            if len(self._quiet_until) >= _MOST_REMEMBERED:
                self._quiet_until.clear()
            self._quiet_until[sentence] = now + pause_seconds
            logger.warning("%s", sentence)
