"""Page: what the attacks found, as one table for a terminal and one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from attacks.exposure import CHANCE
from attacks.membership import FALSE_ALARMS
from attacks.setting import OPEN, PRIVATE, PROTECTIONS, SUM
from attacks.trials import Audited, Recovered, Remembered
from server.charts import Series, columns, lines
from server.markup import Markup, element, join, table
from server.page import charts, render_page, section
from server.table import align
from server.units import figure

_POINTS = 24
"""Most markers on a line."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All trials of one run of the attacks.

    Attributes:
        base: the demo's model, which span test, exposure and membership were tried on.
        small: the tiny model that was audited.
        epsilon: the promise of the private runs.
        delta: its delta.
        recovered: of the span test.
        remembered: of exposure and membership.
        audited: of one-run auditing.
    """

    base: str
    small: str
    epsilon: float
    delta: float
    recovered: Recovered
    remembered: Remembered
    audited: Audited

    @property
    def broken(self) -> bool:
        """Whether a lower bound is above the promise: then the promise is not kept."""
        return self.audited.bounds[PRIVATE] > self.epsilon


def list_rows(found: Findings) -> list[list[str]]:
    """Head and rows of the table."""
    recovered, remembered, audited = found.recovered, found.remembered, found.audited
    head = ["what the aggregator learns", *PROTECTIONS[:2], f"epsilon = {found.epsilon:g}"]
    rows = {
        f"span test: share of the {recovered.tokens} tokens of {recovered.texts} texts": (
            [f"{recovered.shares[name]:.0%}" for name in PROTECTIONS],
            "0%",
        ),
        f"canary exposure: bits of {figure(remembered.most)}": (
            [f"{fmean(remembered.exposures[name]):.1f}" for name in PROTECTIONS],
            f"{CHANCE:.1f}",
        ),
        "membership: AUC": (
            [f"{remembered.separations[name].auc:.2f}" for name in PROTECTIONS],
            "0.50",
        ),
        f"membership: found at {FALSE_ALARMS:.0%} false alarms": (
            [f"{remembered.separations[name].found:.0%}" for name in PROTECTIONS],
            f"{FALSE_ALARMS:.0%}",
        ),
        f"one-run audit: epsilon is at least (of {audited.most:.1f})": (
            [f"{audited.bounds[name]:.2f}" for name in PROTECTIONS],
            "0.00",
        ),
    }
    return [[*head, "nothing learned"], *([name, *cells, no] for name, (cells, no) in rows.items())]


def render_text(found: Findings) -> str:
    """The table as markdown."""
    return align(list_rows(found))


def render_findings(found: Findings) -> str:
    """The page."""
    head, *body = list_rows(found)
    recovered, audited = found.recovered, found.audited
    return render_page(
        "fedqlora: attacks",
        join(
            [
                element("h1", "What an aggregator could recover"),
                element(
                    "p",
                    "Attacks on real rounds of this system: three sites with their trainers, "
                    "signed envelopes, masks and ledgers. The aggregator writes the run's "
                    "configuration and chooses the adapter that it sends, within a default policy. "
                    "It attacks site a.",
                ),
                section("Result", table(head, body, label="result of the attacks")),
                section("Span test", *_span(found.base, recovered)),
                section("Canary exposure and membership", *_memory(found)),
                section("One-run audit", *_audit(found.small, found, audited)),
            ]
        ),
    )


def _span(base: str, recovered: Recovered) -> Sequence[Markup | str]:
    wrong = ", ".join(f"{recovered.wrong[name]} ({name})" for name in PROTECTIONS)
    distances = [
        Series(name=name, points=_thin(list(enumerate(recovered.distances[name], start=1))))
        for name in PROTECTIONS
    ]
    return (
        f"{base}: one step on {recovered.texts} texts. Each of {recovered.vocabulary:,} tokens of "
        "the vocabulary is tried; one whose first-layer input lies in the span of the update's "
        "rows (distance below 0.1) is named. The optimizer's settings are the aggregator's: AdamW "
        "with a tiny max_grad_norm is a plain gradient step. With the demo's own settings the "
        f"same test names {recovered.usual:.0%}. Named though in no site's texts: {wrong}.",
        charts(
            lines(
                "Distance of the site's tokens from the span",
                distances,
                x="token, nearest first",
                y="distance",
                zero=True,
            )
        ),
    )


def _memory(found: Findings) -> Sequence[Markup | str]:
    remembered = found.remembered
    curves = [
        Series(name=name, points=_roc(remembered.separations[name].curve)) for name in PROTECTIONS
    ]
    bits = {name: (fmean(remembered.exposures[name]),) for name in PROTECTIONS}
    return (
        f"{found.base}: {remembered.members} texts and {len(remembered.exposures[OPEN])} secret "
        f"numbers are trained on, {remembered.others} other texts of the same hospital are not. "
        "Exposure: how far the secret's loss stands out among those of other numbers. Membership: "
        "how much a text's loss fell. Secure aggregation shows the mean of three sites; it hides "
        "whose text it was and was not made to hide what all sites together remember.",
        charts(
            columns(
                "Exposure of the secrets", bits, names=["bits"], x="protection", y="bits, mean"
            ),
            lines(
                "Members found",
                [
                    *curves,
                    Series(name="a coin", points=[(0.0, 0.0), (1.0, 1.0)], quiet=True),
                ],
                x="share of other texts accused",
                y="share of members found",
                zero=True,
            ),
        ),
    )


def _audit(small: str, found: Findings, audited: Audited) -> Sequence[Markup | str]:
    bounds = {name: (audited.bounds[name],) for name in PROTECTIONS}
    verdict = "above: the promise is broken" if found.broken else "not above"
    return (
        f"{small} (the test does not depend on a model's size): each of {audited.canaries} "
        "canaries was trained on or not by the toss of a coin, the aggregator guesses which. So "
        "many right guesses need an epsilon of at least the figure, with confidence 99.9 %. The "
        f"private round promised {found.epsilon:g} at delta {found.delta:g}; its bound of "
        f"{audited.bounds[PRIVATE]:.2f} is {verdict}. A sum of few sites promises nothing "
        f"({audited.bounds[SUM]:.2f}).",
        charts(
            columns(
                "Lower bound of epsilon", bounds, names=["at least"], x="protection", y="epsilon"
            )
        ),
    )


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evenly spaced points of a long line, the last one among them."""
    step = max(1, -(-len(points) // _POINTS))
    return [*points[:-1:step], points[-1]]


def _roc(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The most that is found at evenly spaced shares of others accused."""
    return [
        (share / 20, max(found for accused, found in curve if accused <= share / 20))
        for share in range(21)
    ]
