"""Options: the demo's command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from demo.partition import PARTITIONS
from server.bundle import REPOSITORY


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; `command` is its name, `settings` what `--set` gave."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="prepares what is missing, federates or simulates, and prints the result",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--home", type=Path, default=REPOSITORY, help="keeps certificates, model, records and runs"
    )
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="overrides the TOML file, such as training.steps=5; can be given again",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a new run", parents=[settings])
    run.add_argument("--experiment", default="icd10", help="a name in experiments/, or a TOML file")
    run.add_argument("--sites", type=int, default=3)
    run.add_argument("--rounds", type=int, default=4)
    run.add_argument("--aggregation", metavar="METHOD", help="in place of the experiment's")
    run.add_argument("--partition", choices=PARTITIONS, default="dirichlet", help="of the records")
    run.add_argument("--baselines", action="store_true", help="also each hospital alone, and all")
    simulation = commands.add_parser(
        "simulate", help="many sites in one process tree, under Ray", parents=[settings]
    )
    simulation.add_argument("--experiment", default="tiny", help="as for run")
    simulation.add_argument("--sites", type=int, default=20)
    simulation.add_argument("--rounds", type=int, help="default: the experiment's")
    simulation.add_argument(
        "--devices", help="a name in experiments/devices/, or a TOML file: the sites' machines"
    )
    simulation.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="sites that train at one time"
    )
    resume = commands.add_parser("resume", help="continue a run that was cut off")
    resume.add_argument("run", type=Path, help="its run folder")
    scored = commands.add_parser("evaluate", help="scores at a hospital that took no part")
    scored.add_argument("run", type=Path, help="the finished run's folder")
    held = commands.add_parser("held-out", help="where the held-out set of a run is")
    held.add_argument("run", type=Path, help="its run folder")
    further = commands.add_parser(
        "continue", help="a further task on a finished run", parents=[settings]
    )
    further.add_argument("run", type=Path, help="the finished run's folder")
    further.add_argument("--experiment", required=True, help="the task, as for run")
    further.add_argument("--rounds", type=int, help="default: the experiment's")
    compare = commands.add_parser("compare", help="several experiments, one after the other")
    compare.add_argument("--experiments", required=True, help='their names, such as "icd10-*"')
    compare.add_argument(
        "--folder", type=Path, default=REPOSITORY / "experiments", help="where their files are"
    )
    compare.add_argument("--sites", type=int, default=3)
    compare.add_argument("--rounds", type=int, help="in place of each experiment's own")
    return parser
