"""Exporter: Prometheus metrics over HTTP, and those of the SuperLink.

No login and no TLS: they hold names of sites, times and sizes, and belong on loopback or on the
internal network only.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedqlora.address import split_address

if TYPE_CHECKING:
    from fedqlora.credentials import ReloadingIdentity
    from server.admission import Admission


def serve_metrics(collector: Collector, address: str) -> None:
    """Serve a collector's metrics from a thread of this process; every scrape asks it anew.

    Raises:
        ConfigError: the address is not HOST:PORT.
    """
    host, port = split_address(address, "the metrics' address")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    start_http_server(port, host, registry)


class SuperLinkMetrics(Collector):
    """What a SuperLink knows: certificates, revocation lists, and the sites' newest calls."""

    def __init__(self, identities: ReloadingIdentity, admission: Admission) -> None:
        self._identities = identities
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        identity, rules = self._identities.follow(), self._admission.rules
        yield GaugeMetricFamily(
            "fedqlora_certificate_expiry_timestamp_seconds",
            "When the SuperLink's certificate expires.",
            identity.leaf.not_valid_after_utc.timestamp(),
        )
        yield GaugeMetricFamily(
            "fedqlora_crl_expiry_timestamp_seconds",
            "When the first revocation list is to be replaced.",
            rules.lists_end,
        )
        yield GaugeMetricFamily(
            "fedqlora_trusted_authorities",
            "Authorities that sites may come from; two while an authority is rolled over.",
            len(rules.authorities),
        )
        failures = CounterMetricFamily(
            "fedqlora_reload_failures",
            "New files that did not pass the checks; the last good ones stayed.",
            labels=["files"],
        )
        failures.add_metric(["certificate"], self._identities.failures)
        failures.add_metric(["roster"], self._admission.failures)
        yield failures
        problem = GaugeMetricFamily(
            "fedqlora_reload_problem",
            "1 while the newest files are not used because they are bad.",
            labels=["files"],
        )
        problem.add_metric(["certificate"], self._identities.problem is not None)
        problem.add_metric(["roster"], self._admission.problem is not None)
        yield problem
        yield from self._sites(sorted(rules.nodes.values()))

    def _sites(self, names: list[str]) -> Iterator[Metric]:
        seen = GaugeMetricFamily(
            "fedqlora_site_last_seen_timestamp_seconds",
            "Newest admitted call of a site of the roster; 0: none since the SuperLink started.",
            labels=["site"],
        )
        skew = GaugeMetricFamily(
            "fedqlora_site_clock_skew_seconds",
            "How far a site's clock is ahead of this one's, less the way here.",
            labels=["site"],
        )
        expiry = GaugeMetricFamily(
            "fedqlora_site_certificate_expiry_timestamp_seconds",
            "When the certificate of a site's newest call expires.",
            labels=["site"],
        )
        for name in names:
            newest = self._admission.seen.get(name)
            seen.add_metric([name], newest.time if newest else 0)
            if newest is not None:
                expiry.add_metric([name], newest.until)
                sent = _read_time(newest.sent)
                if sent is not None:
                    skew.add_metric([name], sent - newest.time)
        yield from (seen, skew, expiry)


def _read_time(text: str) -> float | None:
    """Seconds since 1970 of a time in ISO 8601; None if it is none: a site may send anything."""
    try:
        stamp = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=datetime.UTC)).timestamp()
