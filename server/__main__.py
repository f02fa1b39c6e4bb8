"""The coordinator's commands: `python -m server enrol|evict|run|resume|status|digest|...`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from fedqlora.errors import FedqloraError
from server import commands
from server.bundle import REPOSITORY


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options.command(options)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line; what every command of one cluster shares may come from variables."""
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands_ = parser.add_subparsers(required=True)

    enrol = commands_.add_parser("enrol", help="register the keys of all sites in the roster")
    enrol.set_defaults(command=commands.enrol)
    evict = commands_.add_parser("evict", help="unregister a site for good; its key is burned")
    evict.set_defaults(command=commands.evict)
    evict.add_argument("site", help="its name in the roster")
    run = commands_.add_parser("run", help="start a run, follow it, print its result")
    run.set_defaults(command=commands.run)
    further = commands_.add_parser("continue", help="start a further task on a finished run")
    further.set_defaults(command=commands.further)
    further.add_argument("run", help="the finished run folder's name")
    for command in (run, further):
        command.add_argument(
            "--experiment", required=True, help="a name in EXPERIMENTS, or a TOML file"
        )
        command.add_argument("--experiments", type=Path, default=REPOSITORY / "experiments")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            dest="settings",
            metavar="KEY=VALUE",
            help="overrides the TOML file, such as federation.rounds=2; can be given again",
        )
    resume = commands_.add_parser("resume", help="continue a run that has not finished")
    resume.set_defaults(command=commands.resume)
    resume.add_argument("run", help="its run folder's name")
    status = commands_.add_parser("status", help="sites and runs")
    status.set_defaults(command=commands.show_status)
    forget = commands_.add_parser("forget", help="let a site start a new audit log")
    forget.set_defaults(command=commands.forget)
    forget.add_argument("site", help="its name in the roster")
    metrics = commands_.add_parser("metrics", help="serve Prometheus metrics of all runs")
    metrics.set_defaults(command=commands.serve_run_metrics)
    metrics.add_argument("--listen", default="127.0.0.1:9465", help="HOST:PORT; it has no login")
    for command in (enrol, evict, run, further, resume, status):
        _add(command, "--control", help="HOST:PORT of the SuperLink's Control API")
        _add(command, "--root-certificates", Path, help="authority of the SuperLink's certificate")
        command.add_argument(
            "--wait-seconds", type=float, default=60.0, help="how long the SuperLink may take"
        )
    for command in (enrol, run, further, forget):
        _add(command, "--coordinator", Path, help="folder with signing.key and the signed roster")
    for command in (run, further, resume, status, forget, metrics):
        _add(command, "--runs", Path, help="folder of run folders")
    digest = commands_.add_parser("digest", help="digest of the app that `run` ships to sites")
    digest.set_defaults(command=commands.digest)
    for command in (run, further, resume, digest):
        command.add_argument("--app", type=Path, default=REPOSITORY, help="holds pyproject.toml")

    report = commands_.add_parser("report", help="one HTML page of a run")
    report.set_defaults(command=commands.report)
    report.add_argument("run", type=Path, help="its folder")
    report.add_argument("--out", type=Path, help="the page; default RUN/report.html")
    compare = commands_.add_parser("compare", help="a table and a page of several runs")
    compare.set_defaults(command=commands.compare)
    compare.add_argument("run", type=Path, nargs="+", help="their folders")
    compare.add_argument(
        "--out", type=Path, help="the page; default comparison-TIME.html beside the first run"
    )

    export = commands_.add_parser("export", help="merge the adapter into a standard checkpoint")
    export.set_defaults(command=commands.export)
    export.add_argument("--out", type=Path, help="new folder; default RUN/merged")
    ask = commands_.add_parser("ask", help="answers of the base and of the tuned model")
    ask.set_defaults(command=commands.ask)
    scored = commands_.add_parser("evaluate", help="scores on another held-out set")
    scored.set_defaults(command=commands.evaluate)
    scored.add_argument(
        "--held-out", type=Path, required=True, help="folder with .jsonl files and choices.json"
    )
    harness = commands_.add_parser("benchmark", help="lm-evaluation-harness on the merged model")
    harness.set_defaults(command=commands.benchmark)
    harness.add_argument("--held-out", type=Path, help="folder whose fields are tasks")
    harness.add_argument("--tasks", help="its own tasks, by name: a,b")
    harness.add_argument("--limit", type=int, help="rows of each task")
    for command in (export, ask, scored, harness):
        command.add_argument("run", type=Path, help="a finished run's folder")
        command.add_argument("--models", type=Path, default=Path(".cache/models"))
    ask.add_argument("prompt")
    ask.add_argument("--tokens", type=int, default=32, help="longest answer")
    return parser


def _add(
    parser: argparse.ArgumentParser, option: str, kind: type[str] | type[Path] = str, *, help: str
) -> None:
    """An option that a variable gives where the command line does not: FEDQLORA_CONTROL, ..."""
    name = "FEDQLORA_" + option.strip("-").replace("-", "_").upper()
    given = os.environ.get(name)
    parser.add_argument(
        option, type=kind, default=given, required=not given, help=f"{help} (or ${name})"
    )


if __name__ == "__main__":
    sys.exit(main())
