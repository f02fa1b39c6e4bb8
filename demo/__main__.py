"""The demo: prepares what is missing, federates or simulates, and prints the result."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certs.files import CertificateError
from demo.devices import SAME, Devices, assign, load_devices
from demo.earlier import SITES, put_aside
from demo.hospitals import Hospitals
from demo.options import make_parser
from demo.processes import LocalFederation
from fedqlora.config import RunConfig, validate
from fedqlora.errors import ConfigError, FedqloraError
from server import submit
from server.bundle import REPOSITORY, pack
from server.checkpoint import RunFolder
from server.comparison import compare_runs
from server.continuation import continue_from


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.command == "run":
            _run(options)
        elif options.command == "simulate":
            _simulate(options)
        elif options.command == "evaluate":
            _evaluate(options)
        elif options.command == "held-out":
            folder = RunFolder(options.run.resolve())
            demo = _read_demo(folder)
            print(_hospitals(folder.config(), demo, options.home.resolve()).held_out)
        elif options.command == "continue":
            _continue(options)
        elif options.command == "compare":
            _compare(options)
        else:
            _resume(RunFolder(options.run.resolve()), options.home.resolve())
    except (FedqloraError, CertificateError) as error:
        if options.debug:
            raise
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("stopped; every process was ended\n")
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    """Prepare, create the run folder, federate, report."""
    if options.rounds < 1:
        raise ConfigError(f"ROUNDS={options.rounds} is not a number of rounds; choose 1 or more")
    overrides = {
        "federation.expected_sites": options.sites,
        "federation.rounds": options.rounds,
        "evaluation.enabled": True,
        # One score at the end: each costs as much as a round here.
        "evaluation.every_rounds": options.rounds,
    }
    if options.aggregation:
        overrides["aggregation.method"] = options.aggregation
    overrides |= submit.parse_settings(options.settings)
    experiment = submit.find_experiment(options.experiment, REPOSITORY / "experiments")
    config = submit.configure(experiment, overrides, options.sites)
    home = options.home.resolve()
    hospitals = Hospitals(config, options.sites, home, options.partition)
    _prepare(hospitals, home / "runs")
    facts = {"partition": options.partition, "baselines": options.baselines}
    folder = _create(home / "runs", config, hospitals, facts)
    _federate(folder, config, hospitals)
    _report(folder, hospitals, options.baselines)


def _simulate(options: argparse.Namespace) -> None:
    """Prepare, create the run folder, simulate, report."""
    if options.workers < 1:
        raise ConfigError(f"WORKERS={options.workers} is not a number of workers; choose 1 or more")
    overrides: dict[str, object] = {"federation.expected_sites": options.sites}
    if options.rounds is not None:
        overrides["federation.rounds"] = options.rounds
    overrides |= submit.parse_settings(options.settings)
    experiment = submit.find_experiment(options.experiment, REPOSITORY / "experiments")
    config = submit.configure(experiment, overrides, options.sites)
    devices = SAME
    if options.devices:
        known = REPOSITORY / "experiments" / "devices"
        devices = load_devices(submit.find_experiment(options.devices, known))
    home = options.home.resolve()
    hospitals = Hospitals(config, options.sites, home, simulated=True)
    # Runs of their own: the centre's audit log there knows the simulated sites and no others.
    runs = home / "runs" / "simulated"
    _prepare(hospitals, runs)
    facts = {"devices": devices.model_dump(mode="json"), "workers": options.workers}
    folder = _create(runs, config, hospitals, facts)
    _run_simulation(folder, hospitals, devices, options.workers)


def _continue(options: argparse.Namespace) -> None:
    """A further task, with the sites and machines of the finished run."""
    earlier = RunFolder(options.run.resolve())
    demo = _read_demo(earlier)
    overrides: dict[str, object] = {
        "federation.expected_sites": demo["sites"],
        "evaluation.enabled": True,
    }
    if options.rounds is not None:
        if options.rounds < 1:
            raise ConfigError(
                f"ROUNDS={options.rounds} is not a number of rounds; choose 1 or more"
            )
        overrides |= {
            "federation.rounds": options.rounds,
            "evaluation.every_rounds": options.rounds,
        }
    overrides |= submit.parse_settings(options.settings)
    experiment = submit.find_experiment(options.experiment, REPOSITORY / "experiments")
    further = continue_from(
        earlier,
        lambda chain: submit.configure(experiment, {**overrides, **chain}, int(demo["sites"])),
    )
    hospitals = _hospitals(further.config, demo, options.home.resolve())
    _prepare(hospitals, earlier.path.parent)
    further.check_base(hospitals.digest())
    skew = hospitals.skew()
    folder = further.create(earlier.path.parent)
    _describe_folder(folder, skew, {**demo, "baselines": False})
    _go_on(folder, hospitals, demo)


def _evaluate(options: argparse.Namespace) -> None:
    """Score a finished run on the texts of a hospital that took no part."""
    folder = RunFolder(options.run.resolve())
    home = options.home.resolve()
    hospitals = _hospitals(folder.config(), _read_demo(folder), home)
    newcomer = hospitals.data / "newcomer"
    if not newcomer.is_dir():
        raise ConfigError(
            f"{newcomer} does not exist: only the demo's ICD-10 records have a hospital that took "
            "no part; give HELD_OUT=folder, or remove the folder above it to have it made anew"
        )
    # Imported here: it brings in torch.
    from server.rescore import rescore

    print(rescore(folder, newcomer, hospitals.models), flush=True)


def _prepare(hospitals: Hospitals, runs: Path) -> None:
    """Make what a run reads, and what its sites keep, before there is a folder for it."""
    hospitals.prepare()
    if aside := put_aside(runs, hospitals.certs):
        print(f"audit logs of earlier keys: {os.path.relpath(aside)}", flush=True)
    hospitals.make_ledgers(runs)


def _read_demo(folder: RunFolder) -> dict[str, Any]:
    """What a demo knows of a run of its own.

    Raises:
        ConfigError: it is another's, as a cluster's.
        CheckpointError: it cannot be read.
    """
    if not (folder.path / "demo.json").exists():
        raise ConfigError(
            f"{_show(folder)} has no demo.json, so the demo did not run it: name texts to score by "
            "HELD_OUT=folder; a cluster's run is continued by `make run` with RESUME or FROM"
        )
    return folder.read_json("demo.json")


def _hospitals(config: RunConfig, demo: Mapping[str, Any], home: Path) -> Hospitals:
    """The parties of a run by its demo.json; one of an earlier release has no partition there."""
    partition = demo.get("partition", "dirichlet")
    return Hospitals(config, int(demo["sites"]), home, partition, simulated="devices" in demo)


def _go_on(folder: RunFolder, hospitals: Hospitals, demo: Mapping[str, Any]) -> None:
    """Run or resume a run folder as its demo.json says, and report."""
    if "devices" in demo:
        devices = validate(Devices, demo["devices"], str(folder.path / "demo.json"))
        _run_simulation(folder, hospitals, devices, int(demo["workers"]))
        return
    if not folder.is_finished:
        _federate(folder, folder.config(), hospitals)
    _report(folder, hospitals, bool(folder.read_json("demo.json")["baselines"]))


def _run_simulation(
    folder: RunFolder, hospitals: Hospitals, devices: Devices, workers: int
) -> None:
    """Simulate a run to its end and print its result."""
    # Imported here: the demo's other commands start faster without Flower's apps.
    from demo.simulation import lay_out, simulate

    config = folder.config()
    kinds = assign(devices, len(hospitals.names), config.seed)
    counted = Counter(kind.name for kind in kinds)
    print(
        f"run {_show(folder)}: simulating {len(kinds)} sites "
        f"({', '.join(f'{count} {name}' for name, count in counted.items())}), "
        f"{workers} at a time",
        flush=True,
    )
    simulate(
        folder,
        lay_out(folder, hospitals, kinds),
        models=hospitals.models,
        certs=hospitals.certs,
        held_out=hospitals.held_out if config.evaluation.enabled else None,
        workers=workers,
    )
    print(f"\n{submit.write_result(folder, submit.read_scores(folder))}\n", flush=True)
    print(f"run folder: {_show(folder)}", flush=True)


def _create(
    runs: Path, config: RunConfig, hospitals: Hospitals, facts: Mapping[str, object]
) -> RunFolder:
    """A new run folder that knows who holds what: only a demo's centre can."""
    skew = hospitals.skew()
    folder = RunFolder.create(runs, config)
    _describe_folder(folder, skew, facts)
    return folder


def _describe_folder(
    folder: RunFolder, skew: Mapping[str, Mapping[str, int]], facts: Mapping[str, object]
) -> None:
    """Write down what a demo knows of a run."""
    folder.write_json("demo.json", {"sites": len(skew), **facts})
    folder.write_json("skew.json", skew)


def _compare(options: argparse.Namespace) -> None:
    """Run experiments that are all valid, then compare their run folders."""
    # Each is scored as often as its file says, and has the rounds that it is about.
    overrides = {"federation.expected_sites": options.sites, "evaluation.enabled": True}
    if options.rounds is not None:
        overrides["federation.rounds"] = options.rounds
    files = submit.match_experiments(options.experiments, options.folder)
    configs = [submit.configure(file, overrides, options.sites) for file in files]
    home = options.home.resolve()
    parties = [Hospitals(config, options.sites, home) for config in configs]
    folders = []
    try:
        for config, hospitals in zip(configs, parties, strict=True):
            _prepare(hospitals, home / "runs")
            folder = _create(home / "runs", config, hospitals, {"baselines": False})
            folders.append(folder.path)
            _federate(folder, config, hospitals)
            _report(folder, hospitals, baselines=False)
    except FedqloraError as error:
        done = " ".join(map(os.path.relpath, folders))
        raise type(error)(f"{error} (run folders so far: {done or 'none'})") from None
    print("\n" + compare_runs([Path(os.path.relpath(folder)) for folder in folders]))


def _resume(folder: RunFolder, home: Path) -> None:
    """Start the same federation again; the ServerApp continues from the newest checkpoint."""
    demo = _read_demo(folder)
    hospitals = _hospitals(folder.config(), demo, home)
    _prepare(hospitals, folder.path.parent)
    _go_on(folder, hospitals, demo)


def _federate(folder: RunFolder, config: RunConfig, hospitals: Hospitals) -> None:
    """Start every process, run, and stop every process again."""
    print(f"run {_show(folder)}: starting SuperLink, evaluator and sites", flush=True)
    with LocalFederation(
        certs=hospitals.certs,
        folder=folder.path / "processes",
        runs=folder.path.parent,
        sites=hospitals.sites(),
        models=hospitals.models,
        held_out=hospitals.held_out if config.evaluation.enabled else None,
        state=folder.path.parent / SITES,
    ) as federation:
        run_id = submit.start(folder, pack(REPOSITORY), federation.control)
        if run_id is not None:
            submit.follow(folder, run_id, federation.control, folder.path / "processes")


def _show(folder: RunFolder) -> str:
    """A run folder's path as one would type it."""
    return os.path.relpath(folder.path)


def _report(folder: RunFolder, hospitals: Hospitals, baselines: bool) -> None:
    """Print the table, and keep it in the run folder."""
    rows = submit.read_scores(folder)
    if baselines:
        from demo.baselines import score_baselines

        stored = folder.path / "baselines.json"
        if not stored.exists():
            found = score_baselines(folder.config(), hospitals)
            folder.write_json(stored.name, found)
        trained = folder.read_json(stored.name)
        pooled = {name: row for name, row in trained.items() if name.startswith("all")}
        alone = {name: row for name, row in trained.items() if name not in pooled}
        federated = {"federated": rows.pop("federated")}
        rows = rows | alone | federated | pooled
    print(f"\n{submit.write_result(folder, rows)}\n\nrun folder: {_show(folder)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
