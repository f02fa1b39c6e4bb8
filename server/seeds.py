"""Seeds: runs that differ in nothing but their seed, as one row with mean and spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from server.history import History
from server.scores import score_keys


def group_seeds(runs: Sequence[History]) -> dict[str, list[History]]:
    """Runs that are one experiment with several seeds, by the experiment's name and method."""
    groups: dict[str, list[History]] = {}
    for run in runs:
        same = run.config.model_dump(mode="json", exclude={"seed"})
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    found: dict[str, list[History]] = {}
    for group in groups.values():
        if len({run.config.seed for run in group}) < len(group) or len(group) < 2:
            continue
        config = group[0].config
        label = f"{config.name}, {config.aggregation.method}"
        while label in found:
            label += "'"
        found[label] = group
    return found


def seed_rows(runs: Sequence[History]) -> list[list[str]]:
    """A head and a row for each group: mean and standard deviation over its seeds; or nothing.

    Only figures that every run of a group has are in its row.
    """
    groups = group_seeds(runs)
    last = {run.name: run.scores[max(run.scores)] for run in runs if run.scores}
    keys = list(
        dict.fromkeys(
            key
            for group in groups.values()
            for run in group
            for key in score_keys(last.get(run.name, {}))
        )
    )
    if not keys:
        return []
    rows = [["over seeds", "seeds", *(f"{name}: {metric}" for name, metric in keys)]]
    for label, group in groups.items():
        cells = [label, ", ".join(str(run.config.seed) for run in group)]
        for name, metric in keys:
            values = [last.get(run.name, {}).get(name, {}).get(metric) for run in group]
            known = [value for value in values if value is not None]
            cells.append(
                f"{statistics.mean(known):.3f} ± {statistics.stdev(known):.3f}"
                if len(known) == len(group)
                else ""
            )
        rows.append(cells)
    return rows
