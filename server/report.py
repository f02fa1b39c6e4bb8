"""Report: one HTML page of a run, from its run folder alone; rewritten after every round."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedqlora.errors import CheckpointError, FedqloraError
from fedqlora.files import write_durably
from server.checkpoint import RunFolder
from server.contributions import cost_charts, loss_charts, share_charts, site_table, skew_table
from server.history import USED, History, read_history
from server.markup import Markup, element, join, table
from server.page import render_page, section, tiles
from server.scores import result_table, score_charts, shown
from server.task_table import task_section
from server.units import duration, figure, megabytes

log = logging.getLogger("server")

REFRESH_SECONDS = 15
"""The page of a running run loads itself anew so often."""

_LONGEST_REASON = 300  # characters: a site may have written it


def write_report(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the page of a run, wholly or not at all, and return its path.

    Args:
        folder: the run.
        out: where to; None is `report.html` in the run folder.

    Raises:
        CheckpointError: the run folder cannot be read, or the page not be written.
    """
    path = out or folder.path / "report.html"
    page = render_report(read_history(folder))
    try:
        write_durably(path, page.encode())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); free space, or choose another OUT"
        ) from None
    return path


def refresh_report(folder: RunFolder) -> None:
    """Write the page of a run; a page that cannot be written does not end the run."""
    try:
        write_report(folder)
    except FedqloraError as error:
        log.warning("no report: %s", error)


def render_report(history: History) -> str:
    """The page of a run."""
    body = join(
        [
            _head(history),
            section("Result", result_table(history)),
            section("What was kept of each task", task_section(history.tasks)),
            section("Held-out scores by round", score_charts(history)),
            section("Losses at the sites", loss_charts(history)),
            section("What each site contributed", share_charts(history), site_table(history)),
            section("Traffic, time and updates", cost_charts(history)),
            section("Rounds that were set back", _set_back(history)),
            section("Who was missing", *_missing(history)),
            section("Data at the sites", skew_table(history)),
            section("Versions", _versions(history)),
            section("Configuration", _configuration(history)),
        ]
    )
    running = history.status in ("new", "running")
    return render_page(
        f"{history.name}: {history.status}",
        body,
        refresh_seconds=REFRESH_SECONDS if running else None,
    )


def _head(history: History) -> Markup:
    config = history.config
    done = max(history.rounds, default=0)
    state = element("span", history.status, class_=f"status {history.status.split()[0]}")
    setting = (
        f"{config.model.base} ({config.model.quantization}), LoRA rank {config.lora.rank}, "
        f"{config.aggregation.method}, {config.training.steps} steps a round and site, "
        f"seed {config.seed}"
    )
    started = ""
    if history.times:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime(history.times[0]))
        started = f", started {stamp} UTC"
    parts: list[str] = [
        element("h1", history.name),
        element("p", state, f"round {done} of {config.federation.rounds}{started}"),
        element("p", setting, class_="soft"),
    ]
    if history.error:
        parts.append(element("p", history.error[:_LONGEST_REASON]))
    if not history.contributions:
        parts.append(element("p", "No round has been asked for yet: there is nothing to show."))
        return join(parts)
    facts = {"sites": str(len(history.sites))}
    for name, first, last in _changes(history):
        facts[name] = f"{figure(first)} → {figure(last)}"
    facts["sent to sites"] = megabytes(history.total("bytes_down"))
    facts["received"] = megabytes(history.total("bytes_up"))
    facts["time in rounds"] = duration(sum(history.rounds.values()))
    return join([*parts, tiles(facts)])


def _changes(history: History) -> list[tuple[str, float, float]]:
    """Held-out loss of the first and of the last score, for each held-out file."""
    if len(history.scores) < 2:
        return []
    first, last = history.scores[min(history.scores)], history.scores[max(history.scores)]
    return [
        (f"held-out loss, {name}", first[name]["loss"], last[name]["loss"])
        for name in shown(last)
        if "loss" in first.get(name, {}) and "loss" in last[name]
    ]


def _missing(history: History) -> Sequence[Markup | str]:
    """Every site and round without a usable update, and why."""
    if not history.contributions and not history.unusable:
        return []
    body = [
        ["", site, "could not take part", reason[:_LONGEST_REASON]]
        for site, reason in history.unusable.items()
    ]
    for round_ in history.rounds_seen:
        asked = {one.site: one for one in history.contributions if one.round == round_}
        for site in history.sites:
            if site not in asked:
                why = history.absent.get(round_, {}).get(site, "it was not connected")
                body.append([str(round_), site, "not asked", why])
            elif (one := asked[site]).outcome != USED:
                body.append([str(round_), site, one.outcome, one.reason[:_LONGEST_REASON]])
            elif site in history.set_aside.get(round_, ()):
                rule = f"aggregation.rule = {history.config.aggregation.rule} did not count it"
                body.append([str(round_), site, "set aside", rule])
    expected = history.config.federation.expected_sites
    here = len(history.sites)
    notes = [f"{here} of {expected} expected sites came."] if expected and here < expected else []
    if not body:
        return [*notes, "Nobody: every site's update was used in every round."]
    head = ["round", "site", "outcome", "reason"]
    return [*notes, table(head, body, label="missing updates", words=4)]


def _set_back(history: History) -> Markup:
    """Rounds whose adapter was not promoted, and who made it worse."""
    if not history.rollbacks:
        return Markup("")
    body = [
        [
            str(one.round),
            "not finite" if one.loss is None else figure(one.loss),
            figure(one.limit),
            f"site {one.site}" if one.site else "nobody stands out",
        ]
        for one in history.rollbacks
    ]
    head = ["round", "held-out loss", "largest allowed", "better without"]
    return table(head, body, label="rounds that were set back")


def _versions(history: History) -> Markup:
    """Packages of the centre and of every site."""
    parties = {"centre": history.versions} if history.versions else {}
    parties |= {f"site {name}": history.software[name] for name in sorted(history.software)}
    packages = sorted({package for versions in parties.values() for package in versions})
    if not packages:
        return Markup("")
    body = [
        [package, *(versions.get(package, "") for versions in parties.values())]
        for package in packages
    ]
    return table(["package", *parties], body, label="versions", words=len(parties) + 1)


def _configuration(history: History) -> Markup:
    body = list(flatten(history.config.model_dump(mode="json")).items())
    keys = table(["key", "value"], body, label="configuration", words=2)
    return element("details", element("summary", f"All {len(body)} keys"), keys)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text, of a configuration."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = "" if value is None else str(value)
    return found
