"""Commands: what each command of `python -m server` does once its command line was read."""

from __future__ import annotations

import argparse
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from fedqlora.address import check_port_is_free, split_address
from fedqlora.errors import CheckpointError, ConfigError, FedqloraError
from server import status, submit
from server.bundle import pack
from server.centre_log import CentreLog
from server.checkpoint import RunFolder
from server.comparison import compare_runs
from server.continuation import continue_from
from server.control import ControlClient
from server.enrolment import enrol_all, evict_site
from server.exporter import serve_metrics
from server.report import write_report
from server.roster import load_roster
from server.run_metrics import RunMetrics


def enrol(options: argparse.Namespace) -> None:
    """Register the SuperNode key of every site in the signed roster."""
    _, roster = load_roster(options.coordinator)
    with _connect(options) as control:
        control.wait(options.wait_seconds)
        for line in enrol_all(control, roster) or ["nothing to do"]:
            print(line)


def evict(options: argparse.Namespace) -> None:
    """Unregister a site's SuperNode, and say when it went and that the others stayed."""
    with _connect(options) as control:
        control.wait(options.wait_seconds)
        for line in evict_site(control, options.site):
            print(line, flush=True)


def forget(options: argparse.Namespace) -> None:
    """Let a site start a new audit log, once somebody knows why its old one is gone."""
    key, _ = load_roster(options.coordinator)
    print(CentreLog(options.runs, key).forget(options.site))


def serve_run_metrics(options: argparse.Namespace) -> None:
    """Serve what run folders and the audit log say, until told to stop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, port = split_address(options.listen, "--listen")
    check_port_is_free(host, port, "--listen")
    serve_metrics(RunMetrics(options.runs), options.listen)
    print(f"metrics of {options.runs} on {options.listen}", flush=True)
    threading.Event().wait()


def run(options: argparse.Namespace) -> None:
    """Start a new run, show its progress, print and keep its result."""
    experiment = submit.find_experiment(options.experiment, options.experiments)
    settings = submit.parse_settings(options.settings)
    _, roster = load_roster(options.coordinator)
    config = submit.configure(experiment, settings, len(roster.sites))
    _begin(lambda: RunFolder.create(options.runs, config), options)


def further(options: argparse.Namespace) -> None:
    """Start a further task on a finished run, show its progress, print and keep its result."""
    experiment = submit.find_experiment(options.experiment, options.experiments)
    settings = submit.parse_settings(options.settings)
    _, roster = load_roster(options.coordinator)
    continuation = continue_from(
        RunFolder(options.runs / Path(options.run).name),
        lambda chain: submit.configure(experiment, {**settings, **chain}, len(roster.sites)),
    )
    _begin(lambda: continuation.create(options.runs), options)


def resume(options: argparse.Namespace) -> None:
    """Continue a run that has not finished, or follow it where it is still going."""
    folder = RunFolder(options.runs / Path(options.run).name)
    if not folder.is_finished:
        bundle = pack(options.app)
        with _connect(options) as control:
            control.wait(options.wait_seconds)
        run_id = submit.start(folder, bundle, lambda: _connect(options))
        if run_id is not None:
            _follow(folder, run_id, options)
            return
    print(submit.write_result(folder, submit.read_scores(folder)))
    print(f"run: {folder.name}")


def show_status(options: argparse.Namespace) -> None:
    """Print which sites are connected and how far each run is."""
    with _connect(options) as control:
        control.wait(options.wait_seconds)
        print(status.describe(control, options.runs))


def digest(options: argparse.Namespace) -> None:
    """Print the digest of the app that `run` ships."""
    print(pack(options.app).digest)


def report(options: argparse.Namespace) -> None:
    """Write the page of a run, finished or not."""
    print(f"report: {write_report(RunFolder(options.run), options.out)}")


def compare(options: argparse.Namespace) -> None:
    """Print the table of several run folders and write their page; nothing is run."""
    print(compare_runs(options.run, options.out))


def export(options: argparse.Namespace) -> None:
    """Merge a run's adapter into a folder that is not there yet."""
    folder = _finished(options.run)
    out = options.out or folder.path / "merged"
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or choose another OUT")
    # Imported here: only `export` and `ask` need torch, and only after their input is checked.
    from fedqlora.engine.base import resolve_base
    from fedqlora.engine.export import merge

    merge(resolve_base(folder.config().model.base, options.models), folder.path / "adapter", out)
    print(f"merged checkpoint: {out}")


def ask(options: argparse.Namespace) -> None:
    """Print the answers of the base and of the tuned model to one prompt."""
    folder = _finished(options.run)
    if not options.prompt.strip():
        raise ConfigError('the prompt is empty; give one, as in PROMPT="Diagnosis: ..."')
    from fedqlora.engine.base import resolve_base
    from fedqlora.engine.export import answer

    base = resolve_base(folder.config().model.base, options.models)
    before, after = answer(base, folder.path / "adapter", options.prompt, options.tokens)
    print(f"base:  {before.strip()}\ntuned: {after.strip()}")


def evaluate(options: argparse.Namespace) -> None:
    """Print how a run's adapter and its untuned base score on another held-out set."""
    folder = _finished(options.run)
    from server.rescore import rescore

    print(rescore(folder, options.held_out, options.models))


def benchmark(options: argparse.Namespace) -> None:
    """Run lm-evaluation-harness on the merged checkpoint, which is made where it is missing."""
    folder = _finished(options.run)
    tasks = [name for name in (options.tasks or "").split(",") if name]
    if not tasks and options.held_out is None:
        raise ConfigError(
            "there is nothing to score; name tasks of lm-evaluation-harness (TASKS=a,b, --tasks) "
            "or a held-out set (HELD_OUT=folder, --held-out)"
        )
    merged = folder.path / "merged"
    if not merged.exists():
        export(argparse.Namespace(run=options.run, models=options.models, out=None))
    import torch

    from server.benchmark_model import benchmark_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(benchmark_model(merged, tasks, options.held_out, options.limit, device))


def _connect(options: argparse.Namespace) -> ControlClient:
    return ControlClient(options.control, options.root_certificates)


def _begin(create: Callable[[], RunFolder], options: argparse.Namespace) -> None:
    """Start a run of a new folder; nothing is left of it where the SuperLink refuses."""
    bundle = pack(options.app)
    with _connect(options) as control:
        control.wait(options.wait_seconds)
    folder = create()
    try:
        with _connect(options) as control:
            run_id = control.start_run(bundle, {"run": folder.name})
    except FedqloraError:
        shutil.rmtree(folder.path)
        raise
    _follow(folder, run_id, options)


def _follow(folder: RunFolder, run_id: int, options: argparse.Namespace) -> None:
    """Show a run to its end; its folder's name is printed last, however it ends."""
    # A container is stopped by SIGTERM: the same to us as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"run {folder.name}: waiting for the sites", flush=True)
    try:
        submit.follow(folder, run_id, lambda: _connect(options), folder.path)
        print("\n" + submit.write_result(folder, submit.read_scores(folder)) + "\n")
    except KeyboardInterrupt:
        print(f"run {folder.name} was stopped; finished rounds are kept, resume continues it")
        raise
    finally:
        print(f"run: {folder.name}", flush=True)


def _finished(path: Path) -> RunFolder:
    """A run folder with a result."""
    folder = RunFolder(path)
    if not (folder.path / "adapter").is_dir():
        raise CheckpointError(
            f"{folder.path} has no finished adapter; finish the run with `make resume RUN=...`"
        )
    return folder
