"""Scores: held-out scores of a run as a table, and as pictures by round."""

from __future__ import annotations

from collections.abc import Mapping

from server.charts import Series, lines
from server.history import Counts, History
from server.intervals import ERROR, half_width, say
from server.markup import Markup, element, join, table
from server.page import charts
from server.units import figure

LOSSES = ("loss", "perplexity")
"""Figures of which less is better."""


def models(history: History) -> dict[str, Counts]:
    """Rows of the result table: untuned base, what it is compared with, the federated model."""
    found: dict[str, Counts] = {}
    if 0 in history.scores:
        first = "untuned base" if not history.config.continual.earlier else "before this task"
        found[first] = history.scores[0]
    found |= history.baselines
    last = max(history.scores, default=0)
    if last:
        found[f"federated, round {last}"] = history.scores[last]
    return found


def result_table(history: History) -> Markup:
    """One row a model, the best of each column marked."""
    return score_table("model", models(history))


def score_table(
    first: str, found: Mapping[str, Counts], more: Mapping[str, Mapping[str, str]] | None = None
) -> Markup:
    """A table of scores: for each held-out file the accuracies, then the loss.

    Args:
        first: heading of the rows' names.
        found: row -> held-out file -> figure -> value.
        more: column -> row -> text, in front of the scores.
    """
    keys = list(dict.fromkeys(key for scores in found.values() for key in score_keys(scores)))
    if not found or not (keys or more):
        return Markup("")
    best = {}
    for name, metric in keys:
        values = [row[name][metric] for row in found.values() if metric in row.get(name, {})]
        if len(set(values)) > 1:
            best[name, metric] = min(values) if metric in LOSSES else max(values)
    body = []
    for row, scores in found.items():
        cells: list[str] = [row, *(column.get(row, "") for column in (more or {}).values())]
        for key in keys:
            value = scores.get(key[0], {}).get(key[1])
            own = scores.get(key[0], {})
            text = "" if value is None else say(value, half_width(own, key[1]))
            marked = value is not None and value == best.get(key)
            cells.append(element("span", text, class_="best") if marked else text)
        body.append(cells)
    head = [f"{name}: {metric}" for name, metric in keys]
    sizes = {
        name: row["examples"]
        for scores in found.values()
        for name, row in scores.items()
        if (name, "loss") in keys and "examples" in row
    }
    note = ", ".join(f"{figure(count)} of {name}" for name, count in sizes.items())
    said = (
        f"Held-out examples: {note}. The best of each column is bold; ± is half of a 95 % interval "
        "over texts, not over seeds."
        if note
        else ""
    )
    whole = table([first, *(more or {}), *head], body, label="held-out scores")
    return join([whole, element("p", said, class_="soft")])


def shown(scores: Counts) -> list[str]:
    """The held-out files; all of them together only where there is but one."""
    return [name for name in scores if name != "all" or len(scores) == 1]


def score_keys(scores: Counts) -> list[tuple[str, str]]:
    """Pairs of held-out file and figure, a file's loss last."""
    return [
        (name, metric)
        for name in shown(scores)
        for metric in sorted(scores[name], key=lambda metric: (metric == "loss", metric))
        if metric != "examples" and not metric.endswith(ERROR)
    ]


def score_charts(history: History) -> Markup:
    """One picture a figure, one line a held-out file."""
    last = history.scores[max(history.scores)] if history.scores else {}
    metrics = list(dict.fromkeys(metric for _, metric in score_keys(last)))
    pictures = []
    for metric in sorted(metrics, key=lambda metric: metric != "loss"):
        found = [
            Series(
                name=name,
                points=[
                    (round_, scores[name][metric])
                    for round_, scores in history.scores.items()
                    if metric in scores.get(name, {})
                ],
            )
            for name in shown(last)
            if metric in last[name]
        ]
        unit = "loss (nats per token)" if metric == "loss" else metric
        pictures.append(lines(f"Held-out {metric}", found, x="round", y=unit))
    return charts(*pictures)
