"""Renewal: a SuperNode that runs follows its key folder, without a restart and without a gap.

A restart would cost a round when an instruction comes meanwhile: the SuperLink answers for a node
that is offline at once, with an error (docs/adr/0007-admission.md). So the connection is
replaced under Flower's channel, after the SuperLink has accepted the new one.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable

import grpc

from fedqlora.credentials import ClientCertificate, ReloadingIdentity
from fedqlora.tls import Identity

logger = logging.getLogger("client")

LOOK_SECONDS = 2.0
"""Time between two looks at the key folder."""

RETRY_SECONDS = 10.0
"""Time between two trials of an identity that the SuperLink has not accepted."""

REMIND_SECONDS = 86400.0
"""Time between two reminders that a renewal is due."""


class Renewal:
    """Presents what is newest in the key folder, and says when a renewal is due."""

    def __init__(
        self,
        identities: ReloadingIdentity,
        certificate: ClientCertificate,
        accepts: Callable[[grpc.Channel], bool],
    ) -> None:
        """Begins to follow; nothing happens before `start` or `look`.

        Args:
            identities: the key folder.
            certificate: what is presented now.
            accepts: whether the SuperLink takes a new connection.
        """
        self._identities = identities
        self._certificate = certificate
        self._accepts = accepts
        self._refused: Identity | None = None
        self._next_trial = 0.0
        self._next_reminder = 0.0

    def start(self) -> None:
        """Looks every few seconds, in a thread of its own, until the process ends."""
        threading.Thread(target=self._run, name="renewal", daemon=True).start()

    def look(self, now: float) -> None:
        """Looks once.

        Args:
            now: a monotonic clock, in seconds.
        """
        newest = self._identities.follow()
        if newest is not self._certificate.identity:
            self._offer(newest, now)
        present = self._certificate.identity
        if is_due(present, datetime.datetime.now(datetime.UTC)) and now >= self._next_reminder:
            self._next_reminder = now + REMIND_SECONDS
            logger.warning(
                "The certificate with serial %s is past two thirds of its lifetime and ends on %s "
                "UTC: renew it.",
                present.serial,
                f"{present.leaf.not_valid_after_utc:%Y-%m-%d %H:%M}",
            )

    def _offer(self, newest: Identity, now: float) -> None:
        """Presents a new identity if the SuperLink takes it; says once that it does not."""
        if newest is self._refused and now < self._next_trial:
            return
        if self._certificate.replace(newest, self._accepts):
            self._refused = None
            self._next_reminder = 0.0
            logger.info("Presenting the certificate with serial %s.", newest.serial)
            return
        if newest is not self._refused:
            logger.warning(
                "The SuperLink does not accept the new certificate with serial %s: staying with "
                "the one with serial %s, trying again every %.0f seconds.",
                newest.serial,
                self._certificate.identity.serial,
                RETRY_SECONDS,
            )
        self._refused, self._next_trial = newest, now + RETRY_SECONDS

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self.look(time.monotonic())
            except Exception:
                logger.exception("The key folder could not be followed; trying again.")


def is_due(identity: Identity, now: datetime.datetime) -> bool:
    """Whether two thirds of a certificate's lifetime are over."""
    start, end = identity.leaf.not_valid_before_utc, identity.leaf.not_valid_after_utc
    return now >= start + (end - start) * 2 / 3
