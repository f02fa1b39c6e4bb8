"""Status: which sites are connected, and how far each run is."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from pathlib import Path

from server.checkpoint import RunFolder
from server.control import ControlClient
from server.state import Node


def describe(control: ControlClient, runs: Path) -> str:
    """Two tables of aligned columns: sites by name, then runs, the newest first.

    Args:
        control: the SuperLink.
        runs: folder of run folders; the SuperLink is asked which of them it still works on.

    Raises:
        FedqloraError: a run folder is damaged.
    """
    nodes = [node for node in control.list_nodes() if node.status != "unregistered"]
    sites = [list_site(node) for node in sorted(nodes, key=lambda node: node.name)]
    active = {run.folder for run in control.list_runs() if run.active}
    folders = [RunFolder(path.parent) for path in runs.glob("*/config.json")]
    folders.sort(key=lambda folder: (folder.path / "config.json").stat().st_mtime, reverse=True)
    return (
        _align([("site", "state", "since (UTC)"), *sites])
        + "\n\n"
        + _align([("run", "status", "round"), *(list_run(folder, active) for folder in folders)])
    )


def list_site(node: Node) -> tuple[str, str, str]:
    """Name, state and time of a site; one that never came is offline since it was registered."""
    state = "online" if node.status == "online" else "offline"
    since = datetime.datetime.fromisoformat(node.since).astimezone(datetime.UTC)
    return node.name, state, f"{since:%Y-%m-%d %H:%M:%S}"


def list_run(folder: RunFolder, active: Collection[str]) -> tuple[str, str, str]:
    """Name, status and round of a run.

    Args:
        folder: the run.
        active: names of the run folders that the SuperLink works on.

    Raises:
        FedqloraError: its status or configuration cannot be read.
    """
    facts = folder.status()
    status = facts["status"]
    if folder.name in active:
        status = "running"
    elif status in ("new", "running"):
        # Its ServerApp or the SuperLink's state is gone, and nobody was there to write it down.
        status = "cut off"
    return folder.name, status, f"{facts.get('round', 0)} of {folder.config().federation.rounds}"


def _align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text under a heading, or a word where there is nothing under it."""
    if len(lines) == 1:
        return f"no {lines[0][0]} yet"
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
