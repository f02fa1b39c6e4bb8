"""History: what a run folder says of its run, read once for its report, card or comparison.

Only the files that every run has are asked for. What a line of `metrics.jsonl` has beyond the
fields named here does no harm, and what it lacks is left out of the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqlora.config import RunConfig
from fedqlora.errors import CheckpointError, ConfigError
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.tasks import FILE, Tasks, assemble

USED = "used"
"""The outcome of an update that went into the round's adapter."""

_LARGEST = 1e15  # a site may send any number; NaN is not below it either

Counts = Mapping[str, Mapping[str, float]]
"""Row -> column -> number."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One site in one round."""

    round: int
    site: str
    outcome: str
    """`used`, or why there was no usable update: late, lost, refused, invalid, ..."""
    reason: str
    """One sentence about a failure; a site may have written it."""
    figures: Mapping[str, float]
    """Every finite number of the line, such as train_loss, tokens, bytes_up."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A round that was set back."""

    round: int
    loss: float | None
    """Held-out loss of its adapter; None if that was not finite."""
    limit: float
    """The largest that would have been promoted."""
    site: str
    """Who made it worse; empty if nobody stood out."""


@dataclass(frozen=True, kw_only=True)
class History:
    """A run so far."""

    name: str
    config: RunConfig
    status: str
    """new, running, cut off, stopped, failed or finished."""
    error: str
    """Why it failed; empty otherwise."""
    times: tuple[float, float] | None
    """First and last event, in seconds since 1970."""
    rounds: Mapping[int, float]
    """Finished round -> its seconds."""
    set_aside: Mapping[int, tuple[str, ...]]
    """Finished round -> sites whose valid updates its rule of aggregation did not count."""
    absent: Mapping[int, Mapping[str, str]]
    """Finished round -> site that was not asked -> why."""
    rollbacks: tuple[Rollback, ...]
    """Rounds whose adapter was not promoted."""
    contributions: tuple[Contribution, ...]
    """In the order of rounds and sites."""
    scores: Mapping[int, Counts]
    """Round -> held-out file -> figure -> value."""
    scoring_seconds: Mapping[int, float]
    """Round -> time that its held-out scores took."""
    software: Mapping[str, Mapping[str, str]]
    """Site that joined -> package -> version."""
    unusable: Mapping[str, str]
    """Site that came and could not take part -> why."""
    versions: Mapping[str, str]
    """Package of the centre -> version."""
    baselines: Mapping[str, Counts]
    """What the run is compared with -> held-out file -> figure -> value."""
    skew: Counts
    """Site -> label -> number of its records, where a centre knows it (the demo's does)."""
    tasks: Tasks | None
    """What was kept of each task; None where the held-out set has no file for each."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that joined or was asked, by name."""
        return tuple(sorted({*self.software, *(one.site for one in self.contributions)}))

    def by_round(self, name: str, site: str) -> dict[int, float]:
        """A figure of one site: round -> value, where it has one."""
        return {
            one.round: one.figures[name]
            for one in self.contributions
            if one.site == site and name in one.figures
        }

    def total(self, name: str, round_: int | None = None) -> float:
        """The sum of a figure over all sites, in one round or all."""
        return sum(
            one.figures.get(name, 0.0)
            for one in self.contributions
            if round_ is None or one.round == round_
        )

    @property
    def rounds_seen(self) -> tuple[int, ...]:
        """Rounds in which at least one site was asked."""
        return tuple(sorted({one.round for one in self.contributions}))


def read_history(folder: RunFolder) -> History:
    """What a run folder says.

    Raises:
        CheckpointError: it is of another release, or one of its files is damaged.
    """
    events = _read_events(folder.path / "metrics.jsonl")
    rounds: dict[int, float] = {}
    set_aside: dict[int, tuple[str, ...]] = {}
    absent: dict[int, Mapping[str, str]] = {}
    rollbacks: list[Rollback] = []
    sites: dict[tuple[int, str], Contribution] = {}
    scores: dict[int, Counts] = {}
    scoring: dict[int, float] = {}
    software: dict[str, Mapping[str, str]] = {}
    unusable: dict[str, str] = {}
    for line in events:
        site, figures = str(line.get("site", "")), _numbers(line)
        round_ = int(figures.pop("round", 0))
        match line["event"]:
            case "joined":
                software[site] = {k: str(v) for k, v in _table(line.get("software")).items()}
                unusable.pop(site, None)
            case "unusable":
                unusable[site] = str(line.get("reason", ""))
            case "site":
                figures.pop("time", None)
                sites[round_, site] = Contribution(
                    round=round_,
                    site=site,
                    outcome=str(line.get("outcome", "")),
                    reason=str(line.get("reason", "")),
                    figures=figures,
                )
            case "round":
                rounds[round_] = figures.get("seconds", 0.0)
                set_aside[round_] = tuple(str(name) for name in line.get("set_aside", ()))
                reasons = _table(line.get("absent"))
                absent[round_] = {name: str(reason) for name, reason in reasons.items()}
            case "rollback":
                rollbacks.append(
                    Rollback(
                        round=round_,
                        loss=figures.get("loss"),
                        limit=figures.get("limit", 0.0),
                        site=site,
                    )
                )
            case "evaluation":
                scores[round_] = _counts(line.get("scores"))
                scoring[round_] = figures.get("seconds", 0.0)
    status, error = _status(folder)
    times = [line["time"] for line in events if isinstance(line.get("time"), int | float)]
    config = _config(folder)
    return History(
        name=folder.name,
        config=config,
        status=status,
        error=error,
        times=(min(times), max(times)) if times else None,
        rounds=rounds,
        set_aside=set_aside,
        absent=absent,
        rollbacks=tuple(rollbacks),
        contributions=tuple(sites[key] for key in sorted(sites)),
        scores=dict(sorted(scores.items())),
        scoring_seconds=scoring,
        software=software,
        unusable=unusable,
        versions={name: str(value) for name, value in _optional(folder, "versions.json").items()},
        baselines={name: _counts(row) for name, row in _optional(folder, "baselines.json").items()},
        skew=_counts(_optional(folder, "skew.json")),
        tasks=assemble(config, scores, _optional(folder, FILE)),
    )


def _read_events(path: Path) -> list[dict[str, Any]]:
    try:
        events = Metrics(path).read()
    except (OSError, ValueError):
        events = [{}]
    if not all(isinstance(line, dict) and "event" in line for line in events):
        raise CheckpointError(f"{path} is damaged; restore it from a backup")
    return events


def _config(folder: RunFolder) -> RunConfig:
    try:
        return folder.config()
    except ConfigError as error:
        release = _optional(folder, "versions.json").get("fedqlora", "unknown")
        raise CheckpointError(
            f"{error} (the run is of another release: {release}); read it with that release"
        ) from None


def _status(folder: RunFolder) -> tuple[str, str]:
    """The status, and the error of a failed run."""
    facts = folder.status()
    status, error = str(facts.get("status", "")), str(facts.get("error", ""))
    if status != "running":
        return status, error
    try:
        with folder.claim(0):
            # Its ServerApp is gone, and nobody was there to write that down.
            return "cut off", error
    except CheckpointError:
        return status, error


def _optional(folder: RunFolder, name: str) -> dict[str, Any]:
    """A JSON file that not every run has."""
    return folder.read_json(name) if (folder.path / name).exists() else {}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line that a chart can hold."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
    }


def _counts(value: object) -> Counts:
    return {name: _numbers(_table(row)) for name, row in _table(value).items()}


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
