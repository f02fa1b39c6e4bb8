"""Comparison: several run folders in one table and on one page; nothing is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedqlora.config import RunConfig
from fedqlora.errors import CheckpointError, ConfigError
from fedqlora.files import write_durably
from server.charts import COLOURS, Series, lines
from server.checkpoint import RunFolder
from server.history import History, read_history
from server.markup import Markup, element, join, table
from server.page import charts, render_page, section
from server.report import flatten
from server.scores import LOSSES, score_keys, score_table
from server.seeds import seed_rows
from server.table import align
from server.units import MEGABYTE, duration, megabytes


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> str:
    """Compare runs: writes the page and returns the table with the page's path under it.

    Args:
        folders: two or more run folders.
        out: the page; None is `comparison-TIME.html` beside the first run folder.

    Raises:
        FedqloraError: see `read_runs` and `write_comparison`.
    """
    runs = read_runs(folders)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = out or folders[0].parent / f"comparison-{stamp}.html"
    write_comparison(runs, path)
    return f"{render_text(runs)}\n\ncomparison: {path}"


def read_runs(folders: Sequence[Path]) -> list[History]:
    """The histories of runs to compare.

    Raises:
        ConfigError: fewer than two, or one twice.
        CheckpointError: one is no run folder of this release.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise ConfigError("a comparison needs two or more different run folders; name them")
    return [read_history(RunFolder(folder)) for folder in folders]


def render_text(runs: Sequence[History]) -> str:
    """The comparison as a markdown table, padded so that it reads well in a terminal."""
    last = {run.name: run.scores[max(run.scores)] if run.scores else {} for run in runs}
    keys = list(dict.fromkeys(key for scores in last.values() for key in score_keys(scores)))
    facts = _facts(runs)
    body = [
        [
            run.name,
            *(column[run.name] for column in facts.values()),
            *(_cell(last[run.name].get(name, {}).get(metric)) for name, metric in keys),
        ]
        for run in runs
    ]
    whole = align([["run", *facts, *(f"{name}: {metric}" for name, metric in keys)], *body])
    over = seed_rows(runs)
    return f"{whole}\n\n{align(over)}" if over else whole


def write_comparison(runs: Sequence[History], out: Path) -> None:
    """Write the page of a comparison, wholly or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_durably(out, render_comparison(runs).encode())
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror}); choose another OUT"
        ) from None


def render_comparison(runs: Sequence[History]) -> str:
    """The page of a comparison."""
    folders = [run.name for run in runs]
    names = [run.config.name for run in runs]
    if len(set(names)) == len(names):  # shorter, and tells them apart
        runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    last = {run.name: run.scores[max(run.scores)] if run.scores else {} for run in runs}
    body = join(
        [
            element("h1", f"{len(runs)} runs compared"),
            section("Result", score_table("run", last, _facts(runs)), _over_seeds(runs)),
            section("What differs in their configuration", _differences(runs, folders)),
            section("Held-out scores by round", _by_round(runs)),
            section(
                "What a score costs",
                _against_bytes(runs),
                _against(
                    runs, "local steps", "steps of a site in a round", lambda c: c.training.steps
                ),
                _against(runs, "privacy", "1 / epsilon (0: nothing is promised)", _promise),
            ),
        ]
    )
    return render_page(f"comparison of {len(runs)} runs", body)


def _facts(runs: Sequence[History]) -> dict[str, dict[str, str]]:
    """Column -> run -> text."""
    guards = {run.name: _protection(run.config) for run in runs}
    return ({"protection": guards} if set(guards.values()) != {"none"} else {}) | {
        "status": {run.name: run.status for run in runs},
        "sites": {run.name: str(len(run.sites)) for run in runs},
        "rounds": {
            run.name: f"{max(run.rounds, default=0)} of {run.config.federation.rounds}"
            for run in runs
        },
        "down": {run.name: megabytes(run.total("bytes_down")) for run in runs},
        "up": {run.name: megabytes(run.total("bytes_up")) for run in runs},
        "time in rounds": {run.name: duration(sum(run.rounds.values())) for run in runs},
    }


def _protection(config: RunConfig) -> str:
    """What guards the updates, in a few words."""
    own = config.privacy
    promises = [
        (own.unit, None if own.unit == "none" else own.epsilon),
        ("site", config.site_privacy.epsilon),
    ]
    found = [f"epsilon {value:g} a {whose}" for whose, value in promises if value is not None]
    if config.secure_aggregation.enabled:
        found.append("secure aggregation")
    if config.homomorphic_encryption.enabled:
        found.append("encryption")
    return ", ".join(found) or "none"


def _over_seeds(runs: Sequence[History]) -> Markup:
    rows = seed_rows(runs)
    return table(rows[0], rows[1:], label="scores over seeds") if rows else Markup("")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _differences(runs: Sequence[History], folders: Sequence[str]) -> Markup:
    """The keys that are not the same in all runs, under the names of the run folders."""
    found = {run.name: flatten(run.config.model_dump(mode="json")) for run in runs}
    keys = dict.fromkeys(key for values in found.values() for key in values)
    differing = [key for key in keys if len({values.get(key, "") for values in found.values()}) > 1]
    body = [["folder", *folders]]
    body += [[key, *(values.get(key, "") for values in found.values())] for key in differing]
    return table(["key", *found], body, label="differences", words=len(found) + 1)


def _keys(runs: Sequence[History]) -> list[tuple[str, str]]:
    """Held-out file and figure of every score, the losses first."""
    found = dict.fromkeys(
        key for run in runs for scores in run.scores.values() for key in score_keys(scores)
    )
    return sorted(found, key=lambda key: key[1] not in LOSSES)


def _unit(metric: str) -> str:
    return "loss (nats per token)" if metric == "loss" else metric


def _by_round(runs: Sequence[History]) -> Markup:
    pictures = []
    for name, metric in _keys(runs):
        points = {run.name: _points(run, name, metric) for run in runs}
        pictures.append(lines(f"{name}: {metric}", _series(points), x="round", y=_unit(metric)))
    return charts(*pictures)


def _points(run: History, name: str, metric: str) -> list[tuple[float, float | None]]:
    """Round and score, where a run has one."""
    return [
        (round_, scores[name][metric])
        for round_, scores in run.scores.items()
        if metric in scores.get(name, {})
    ]


def _against_bytes(runs: Sequence[History]) -> Markup:
    """Each score against what had travelled by then, both ways and over all sites."""
    pictures = []
    for name, metric in _keys(runs):
        points = {
            run.name: [
                (_bytes_until(run, int(round_)) / MEGABYTE, value)
                for round_, value in _points(run, name, metric)
            ]
            for run in runs
        }
        title = f"{name}: {metric} against bytes"
        pictures.append(
            lines(title, _series(points), x="sent and received so far (MB)", y=_unit(metric))
        )
    return charts(*pictures)


def _bytes_until(run: History, round_: int) -> float:
    return sum(
        one.figures.get("bytes_down", 0.0) + one.figures.get("bytes_up", 0.0)
        for one in run.contributions
        if one.round <= round_
    )


def _against(
    runs: Sequence[History], title: str, x: str, of: Callable[[RunConfig], float]
) -> Markup:
    """The last score of each run against what the runs differ in; nothing where they do not."""
    scored = [run for run in runs if run.scores]
    if len({of(run.config) for run in scored}) < 2:
        return Markup("")
    pictures = []
    for name, metric in _keys(scored):
        points: dict[str, list[tuple[float, float | None]]] = {
            run.name: [(of(run.config), _points(run, name, metric)[-1][1])]
            for run in scored
            if _points(run, name, metric)
        }
        heading = f"{name}: last {metric} against {title}"
        pictures.append(lines(heading, _series(points), x=x, y=_unit(metric)))
    return charts(*pictures)


def _promise(config: RunConfig) -> float:
    """1 / epsilon: grows with the promise, and is 0 where nothing is promised."""
    promised = config.privacy.epsilon if config.privacy.unit != "none" else None
    return 0.0 if promised is None else 1 / promised


def _series(points: Mapping[str, Sequence[tuple[float, float | None]]]) -> list[Series]:
    """A line a run; more than there are colours are told apart by their tooltips only."""
    found = {name: line for name, line in points.items() if line}
    return [
        Series(name=name, points=line, quiet=index >= COLOURS)
        for index, (name, line) in enumerate(found.items())
    ]
