"""Submission: what a person does with a run, from its TOML file to its result table.

experiment -> configuration -> run folder -> start -> follow -> result
"""

from __future__ import annotations

import contextlib
import fnmatch
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqlora.config import RunConfig, load_run, read_toml
from fedqlora.errors import CheckpointError, ConfigError, FederationError
from fedqlora.files import write_durably
from fedqlora.secure import ckks
from server.bundle import Bundle
from server.checkpoint import RunFolder
from server.control import ControlClient
from server.history import read_history
from server.metrics import Metrics
from server.report import refresh_report
from server.runs import wait_for_run
from server.table import Scores, render
from server.task_table import render_tasks
from server.traffic import describe_traffic

Connect = Callable[[], ControlClient]
"""Makes a client of the Control API."""

_SPARE_SECONDS = 600.0  # for scores, and for what a round needs beside its deadline
_CLAIM_SECONDS = 5.0  # a ServerApp that runs has loaded its code by then
_STOP_SECONDS = 15.0  # a ServerApp that is stopped notices when it next looks for replies


def find_experiment(name: str, experiments: Path) -> Path:
    """The TOML file of an experiment.

    Args:
        name: a file in `experiments` without its ending, or the path of a TOML file.
        experiments: folder of experiments.

    Raises:
        ConfigError: the folder has no such file; names those that it has.
    """
    if name.endswith(".toml"):
        return Path(name)
    path = experiments / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in experiments.glob("*.toml"))) or "none"
        raise ConfigError(f"{path} does not exist; experiments there: {known}")
    return path


def match_experiments(pattern: str, experiments: Path) -> list[Path]:
    """The TOML files whose names match, two or more, by name.

    Args:
        pattern: names without ending, separated by spaces; `*` stands for anything.
        experiments: folder of experiments.

    Raises:
        ConfigError: a name matches none, or all together fewer than two.
    """
    known = sorted(file.stem for file in experiments.glob("*.toml"))
    found: set[str] = set()
    for name in pattern.split():
        matching = fnmatch.filter(known, name)
        if not matching:
            raise ConfigError(
                f"no experiment in {experiments} matches {name}; there are: "
                f"{', '.join(known) or 'none'}"
            )
        found |= set(matching)
    if len(found) < 2:
        raise ConfigError(
            f'a comparison needs two or more experiments, and "{pattern}" names {len(found)} of '
            f"{', '.join(known)}; name more"
        )
    return [experiments / f"{name}.toml" for name in sorted(found)]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Overrides from `key=value` texts; a value is written as in TOML.

    Raises:
        ConfigError: a text has another form, or a key is there twice.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        try:
            values = tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            values = {}
        if not equals or list(values) != ["value"] or not all(key.split(".")):
            raise ConfigError(
                f"--set {setting} is not KEY=VALUE with a value as in TOML; write for example "
                "--set federation.rounds=2 or --set 'model.base=\"name\"'"
            )
        if key in overrides:
            raise ConfigError(f"--set {key} is given twice; give it once")
        overrides[key] = values["value"]
    return overrides


def expect_sites(sites: int) -> dict[str, Any]:
    """Overrides that start a run once so many sites are there, or after a while with two."""
    return {"federation.expected_sites": sites, "federation.min_sites": min(sites, 2)}


def configure(experiment: Path, settings: Mapping[str, Any], registered: int) -> RunConfig:
    """The configuration of a run that expects every registered site, unless it says otherwise.

    Args:
        experiment: its TOML file.
        settings: overrides by dotted key.
        registered: number of sites in the roster.

    Raises:
        ConfigError: the file is missing or not TOML, a key or value is wrong, or the run needs
            what is not installed here.
    """
    section = read_toml(experiment).get("federation")
    own = {f"federation.{key}": value for key, value in dict(section or {}).items()}
    own |= settings
    expected = own.get("federation.expected_sites", registered)
    defaults = expect_sites(expected) if isinstance(expected, int) else {}
    missing = {key: value for key, value in defaults.items() if key not in own}
    config = load_run(experiment, {**missing, **settings})
    if config.homomorphic_encryption.enabled:
        ckks.check_installed()
    return config


def start(folder: RunFolder, bundle: Bundle, connect: Connect) -> int | None:
    """Starts a run of a run folder and returns Flower's id of it; None if it has finished.

    A run of this folder that is still going is returned instead. One whose ServerApp died, which
    the SuperLink notices only after a minute, is stopped first.

    Args:
        folder: new, or with checkpoints that the run continues from.
        bundle: the packed Flower app.
        connect: makes a client of the Control API.

    Raises:
        FederationError: the SuperLink refuses the run.
    """
    with connect() as control:
        for run in control.list_runs():
            if run.active and run.folder == folder.name:
                if run.status != "running" or _is_worked_on(folder):
                    return run.run_id
                control.stop_run(run.run_id)
        # Looked at after the runs: a ServerApp says that it has finished before its run ends.
        if folder.is_finished:
            return None
        return control.start_run(bundle, {"run": folder.name})


def _is_worked_on(folder: RunFolder) -> bool:
    """Whether a ServerApp has claimed a run, or does so within the time that its start takes."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    while time.monotonic() < deadline:
        try:
            with folder.claim(0):
                pass
        except CheckpointError:
            return True
        time.sleep(0.2)
    return False


def follow(folder: RunFolder, run_id: int, connect: Connect, logs: Path) -> None:
    """Shows a run's progress until it has finished.

    Interrupted (Ctrl-C), it has the run stopped: the folder then says so, and can be resumed.

    Args:
        folder: the run folder.
        run_id: Flower's id of the run.
        connect: makes a client of the Control API.
        logs: folder for the ServerApp's output.

    Raises:
        FederationError: the run did not finish; says why.
    """
    federation = folder.config().federation
    limit_seconds = federation.wait_seconds + (federation.rounds + 1) * (
        federation.round_deadline_seconds + _SPARE_SECONDS
    )
    log = logs / f"serverapp-{run_id}.log"
    try:
        result = wait_for_run(
            connect, run_id, log, timeout_seconds=limit_seconds, echo=_show_progress
        )
    except (KeyboardInterrupt, SystemExit):
        with connect() as control:
            if not control.stop_run(run_id):
                raise FederationError(
                    f"the SuperLink does not answer, so run {folder.name} may go on; ask for its "
                    "status once the SuperLink is back"
                ) from None
        _record_stop(folder)
        raise
    if result.outcome == "stopped":
        _record_stop(folder)
        raise FederationError(f"run {folder.name} was stopped; resume it to go on")
    if not result.completed:
        reason = folder.status().get("error") or result.details or "see its log"
        raise FederationError(f"run {folder.name} did not finish: {reason}; logs are in {logs}")


def read_scores(folder: RunFolder) -> dict[str, Scores]:
    """Held-out scores of a finished run: of the untuned base and of the federated model.

    Returns:
        Both by name; empty where the run did not ask for scores.
    """
    lines = Metrics(folder.path / "metrics.jsonl").read()
    scores = {line["round"]: line["scores"] for line in lines if line["event"] == "evaluation"}
    if not scores:
        return {}
    first = "untuned base" if not folder.config().continual.earlier else "before this task"
    return {first: scores[min(scores)], "federated": scores[max(scores)]}


def write_result(folder: RunFolder, rows: Mapping[str, Scores]) -> str:
    """Writes a run's result into its folder as result.md: table, tasks, bytes of a round.

    Returns:
        The text.

    The report is written once more: what the run is compared with may have come meanwhile.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = (
        render(rows)
        if rows
        else "No held-out scores: the run had evaluation.enabled = false. The sites' losses are in "
        "metrics.jsonl."
    )
    tasks = read_history(folder).tasks
    kept = render_tasks(tasks) if tasks is not None and len(tasks.names) > 1 else ""
    traffic = describe_traffic(Metrics(folder.path / "metrics.jsonl").read())
    text = "\n\n".join(part for part in (text, kept, traffic) if part)
    try:
        write_durably(folder.path / "result.md", text.encode() + b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder.path / 'result.md'} cannot be written ({error.strerror}); free space"
        ) from None
    refresh_report(folder)
    return text


def _record_stop(folder: RunFolder) -> None:
    """Write down that a run was stopped, once its ServerApp is gone."""
    # One that is in the middle of a score takes longer: the folder then still says `running`,
    # and `status`, which asks the SuperLink too, says `cut off`.
    with contextlib.suppress(CheckpointError), folder.claim(_STOP_SECONDS):
        folder.set_status("stopped", round=folder.status().get("round", 0))
    refresh_report(folder)


def _show_progress(line: str) -> None:
    """Shows our own progress lines of the ServerApp's output."""
    if " server " in line:
        print(line.split(" server ", 1)[1], flush=True)  # noqa: T201
