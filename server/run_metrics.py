"""Run metrics: what run folders and the centre's audit log say, as Prometheus metrics.

A ServerApp lives as long as one run and writes files only; these are read at each scrape, those
that have changed, so nothing is lost when it dies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.answer import INVALID, LATE, LOST, REFUSED
from server.centre_log import FILE


class RunMetrics(Collector):
    """Metrics of all runs in a folder.

    Args:
        runs: folder of run folders and of the centre's audit log.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._known: dict[Path, tuple[tuple[int, int], list[dict[str, Any]]]] = {}

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        yield from self._rounds()
        yield from self._audit()

    def _rounds(self) -> Iterator[Metric]:
        outcomes: Counter[tuple[str, str]] = Counter()
        sent: Counter[tuple[str, str]] = Counter()
        round_ = GaugeMetricFamily(
            "fedqlora_run_round", "A run's newest finished round.", labels=["run"]
        )
        seconds = GaugeMetricFamily(
            "fedqlora_round_duration_seconds", "How long that round took.", labels=["run"]
        )
        for path in sorted(self._runs.glob("*/metrics.jsonl")):
            for line in self._read(path):
                if line["event"] == "site":
                    # Zero first: a series that begins at one does not count as an increase.
                    for outcome in ("used", LATE, LOST, REFUSED, INVALID):
                        outcomes[line["site"], outcome] += 0
                    outcomes[line["site"], line["outcome"]] += 1
                    sent[line["site"], "down"] += line["bytes_down"]
                    sent[line["site"], "up"] += line["bytes_up"]
            finished = [line for line in self._read(path) if line["event"] == "round"]
            if finished:
                round_.add_metric([path.parent.name], finished[-1]["round"])
                seconds.add_metric([path.parent.name], finished[-1]["seconds"])
        yield from (round_, seconds)
        updates = CounterMetricFamily(
            "fedqlora_site_updates",
            "What became of a site's training instructions.",
            labels=["site", "outcome"],
        )
        for labels, count in sorted(outcomes.items()):
            updates.add_metric(labels, count)
        volume = CounterMetricFamily(
            "fedqlora_site_bytes",
            "Bytes of instructions to a site (down) and of its updates (up).",
            labels=["site", "direction"],
        )
        for labels, count in sorted(sent.items()):
            volume.add_metric(labels, count)
        yield from (updates, volume)

    def _audit(self) -> Iterator[Metric]:
        lines = self._read(self._runs / FILE)
        yield GaugeMetricFamily(
            "fedqlora_audit_head_number", "Lines of the centre's audit log.", len(lines)
        )
        heads: dict[str, int] = {}
        contradictions: Counter[str] = Counter()
        ended: Counter[str] = Counter(finished=0, failed=0)
        for line in lines:
            if line["event"] == "replied":
                heads[line["site"]] = line["site_number"]
                contradictions[line["site"]] += 0
            elif line["event"] == "contradicted":
                contradictions[line["site"]] += 1
            elif line["event"] == "ended":
                ended[line["outcome"]] += 1
        head = GaugeMetricFamily(
            "fedqlora_site_audit_head_number",
            "Line of a site's audit log that its newest reply was signed over.",
            labels=["site"],
        )
        for site, number in sorted(heads.items()):
            head.add_metric([site], number)
        bad = CounterMetricFamily(
            "fedqlora_site_audit_contradictions",
            "Replies whose audit head did not fit what was seen before.",
            labels=["site"],
        )
        for site, count in sorted(contradictions.items()):
            bad.add_metric([site], count)
        runs = CounterMetricFamily("fedqlora_runs", "Runs by how they ended.", labels=["outcome"])
        for outcome, count in sorted(ended.items()):
            runs.add_metric([outcome], count)
        yield from (head, bad, runs)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """All whole lines of a file; read again only when it has changed."""
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if path not in self._known or self._known[path][0] != stamp:
                text = path.read_text(encoding="utf-8").splitlines(keepends=True)
                lines = [json.loads(line) for line in text if line.endswith("\n")]
                self._known[path] = (stamp, lines)
        except FileNotFoundError:
            return []
        return self._known[path][1]
