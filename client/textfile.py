"""Textfile: a trainer's metrics in Prometheus' text format, for a node exporter of the hospital.

A trainer has no network: it writes `metrics.prom` into its state folder after every instruction,
whole or not at all. All figures come from the audit log, so they go on over restarts.
"""

from __future__ import annotations

import logging
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile

from fedqlora.audit import AuditLog

log = logging.getLogger("client")


class Textfile:
    """A trainer's metrics file.

    Args:
        path: the file; replaced as a whole.
        audit: the site's log, which all figures are read from.
    """

    def __init__(self, path: Path, audit: AuditLog) -> None:
        self._path = path
        self._audit = audit
        self._registry = CollectorRegistry()
        self._rounds = Counter(
            "fedqlora_trainer_rounds", "Rounds that were trained.", registry=self._registry
        )
        self._bytes = Counter(
            "fedqlora_trainer_sent_bytes",
            "Bytes of descriptions and updates that left.",
            registry=self._registry,
        )
        self._refused = Counter(
            "fedqlora_trainer_refusals", "Instructions that were refused.", registry=self._registry
        )
        self._newest = Gauge(
            "fedqlora_trainer_last_round_timestamp_seconds",
            "When the newest round was trained; 0: never.",
            registry=self._registry,
        )
        self._head = Gauge(
            "fedqlora_trainer_audit_head_number", "Lines of the audit log.", registry=self._registry
        )
        for line in audit.lines():
            self._count(line["event"], line["time"], line.get("bytes_out", 0))
        self._write()

    def note(self, event: str, time: float, bytes_out: int = 0) -> None:
        """Take over a line that was just appended to the audit log, and replace the file.

        A file that cannot be written is logged and stops nobody: the audit log is the record.
        """
        self._count(event, time, bytes_out)
        self._write()

    def _count(self, event: str, time: float, bytes_out: int) -> None:
        self._bytes.inc(bytes_out)
        if event == "trained":
            self._rounds.inc()
            self._newest.set(time)
        elif event == "refused":
            self._refused.inc()

    def _write(self) -> None:
        self._head.set(self._audit.head.number)
        try:
            write_to_textfile(str(self._path), self._registry)
        except OSError as error:
            log.error("%s cannot be written: %s", self._path.name, error.strerror)
