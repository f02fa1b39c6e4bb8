"""Contributions: what each site gave and cost, as pictures by round and as tables."""

from __future__ import annotations

import statistics

from server.charts import COLOURS, Series, columns, lines, rows
from server.history import USED, History
from server.markup import Markup, element, join, table
from server.page import charts
from server.units import MEGABYTE, duration, figure, megabytes


def _by_site(
    history: History, name: str, title: str, unit: str, *, zero: bool = False
) -> Markup | None:
    """A line a site; with more than there are colours, quiet lines and their median."""
    asked = history.rounds_seen
    found = {site: history.by_round(name, site) for site in history.sites}
    found = {site: values for site, values in found.items() if values}
    if not found:
        return None
    many = len(found) > COLOURS
    series = [
        Series(name=f"site {site}", points=[(r, values.get(r)) for r in asked], quiet=many)
        for site, values in found.items()
    ]
    if many:
        heard = {r: [v[r] for v in found.values() if r in v] for r in asked}
        middle = [(r, statistics.median(v) if v else None) for r, v in heard.items()]
        series.append(Series(name="median of the sites", points=middle))
        title += f": median and each of {len(found)} sites"
    return lines(title, series, x="round", y=unit, zero=zero)


def loss_charts(history: History) -> Markup:
    """Training and validation loss of each site, by round."""
    return charts(
        _by_site(history, "train_loss", "Training loss", "loss (nats per token)"),
        _by_site(
            history, "validation_loss", "Validation loss before training", "loss (nats per token)"
        ),
    )


def _used(history: History, name: str) -> dict[str, float]:
    """Site -> sum of a figure over the updates that went into the adapter."""
    sums = dict.fromkeys(history.sites, 0.0)
    for one in history.contributions:
        if one.outcome == USED:
            sums[one.site] += one.figures.get(name, 0.0)
    return sums


def share_charts(history: History) -> Markup:
    """Each site's part of all examples and tokens that went into the adapter."""
    pictures = []
    for name in ("examples", "tokens"):
        sums = _used(history, name)
        if any(sums.values()):
            pictures.append(rows(f"Share of the {name} trained on", sums, unit=name))
    return charts(*pictures)


def site_table(history: History) -> Markup:
    """One row a site: what it trained on, sent and needed."""
    if not history.contributions:
        return Markup("")
    asked = len(history.rounds_seen)
    body = []
    for site in history.sites:
        own = [one for one in history.contributions if one.site == site]
        norms = [one.figures["update_norm"] for one in own if "update_norm" in one.figures]
        body.append(
            [
                site,
                f"{sum(one.outcome == USED for one in own)} of {asked}",
                figure(_used(history, "examples")[site]),
                figure(_used(history, "tokens")[site]),
                figure(statistics.fmean(norms)) if norms else "",
                megabytes(sum(one.figures.get("bytes_down", 0.0) for one in own)),
                megabytes(sum(one.figures.get("bytes_up", 0.0) for one in own)),
                duration(sum(one.figures.get("step_seconds", 0.0) for one in own)),
            ]
        )
    head = ["site", "updates used", "examples", "tokens", "mean update norm"]
    return table(
        [*head, "sent to it", "received", "time in steps"], body, label="sites and their share"
    )


def cost_charts(history: History) -> Markup:
    """Bytes, time by phase and update norms, by round."""
    seen = history.rounds_seen
    pictures: list[Markup | None] = []
    bytes_ = {
        str(r): [history.total(name, r) / MEGABYTE for name in ("bytes_down", "bytes_up")]
        for r in seen
    }
    if any(map(sum, bytes_.values())):
        names = ["to the sites", "from the sites"]
        pictures.append(columns("Bytes on the wire", bytes_, names=names, x="round", y="MB"))
    phases = {}
    for round_, seconds in history.rounds.items():
        steps = max(
            (
                one.figures.get("step_seconds", 0.0)
                for one in history.contributions
                if one.round == round_
            ),
            default=0.0,
        )
        steps = min(max(steps, 0.0), seconds)
        scoring = history.scoring_seconds.get(round_, 0.0)
        phases[str(round_)] = [steps, seconds - steps, scoring]
    if phases:
        names = ["steps of the slowest site", "moving, validating, folding in", "held-out scores"]
        pictures.append(columns("Time by phase", phases, names=names, x="round", y="seconds"))
    norms = _by_site(history, "update_norm", "Norm of each update", "L2 norm", zero=True)
    return charts(*pictures, norms)


def skew_table(history: History) -> Markup:
    """How many records of each label a site holds, coloured by its part of the largest."""
    labels = list(dict.fromkeys(label for row in history.skew.values() for label in row))
    if not labels:
        return Markup("")
    body = []
    for label in labels:
        cells: list[str] = [label]
        for row in history.skew.values():
            count = row.get(label, 0.0)
            share = count / (max(row.values(), default=0.0) or 1.0)
            cells.append(element("div", figure(count), class_="heat", style=f"--share:{share:.2f}"))
        body.append(cells)
    totals = [figure(sum(row.values())) for row in history.skew.values()]
    sites = [f"site {name}" for name in history.skew]
    note = element(
        "p",
        "Records by label; the stronger the colour, the more of one site's records.",
        class_="soft",
    )
    rows_ = [["all", *totals], *body]
    return join([table(["records of", *sites], rows_, label="records by label"), note])
