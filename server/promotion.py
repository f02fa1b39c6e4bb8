"""Promotion: whether what a finished run has learned may take the place of what was there before.

The canary (canary.py) judges each round by the loss over all held-out files; this judges the whole
task, by each earlier task's own accuracy and by plain questions. A run that is not promoted has no
`adapter/`, ends as failed, and cannot be continued; its checkpoints stay.
"""

from __future__ import annotations

from fedqlora.config import RunConfig
from fedqlora.errors import FederationError
from server.checkpoint import RunFolder
from server.history import read_history
from server.tasks import Tasks


def check_measurable(folder: RunFolder, config: RunConfig) -> None:
    """Refuse, before the first round, bounds that no held-out score could be compared with.

    Raises:
        FederationError: names the files that are needed, or the scores that are not there.
    """
    bounds = config.continual
    if bounds.max_forgetting is None and bounds.max_general_loss is None:
        return
    tasks = read_history(folder).tasks
    if tasks is None:
        files = ", ".join(f"{name}.jsonl" for name in (*bounds.earlier, config.task))
        figure = bounds.figure or "options in choices.json"
        raise FederationError(
            f"continual.max_forgetting and max_general_loss need the held-out files {files} and "
            f"{figure}, and not all of these are there; add them to the evaluator's held-out set, "
            "then resume the run"
        )
    if bounds.max_general_loss is not None and tasks.general[0] is None:
        raise FederationError(
            f"continual.max_general_loss compares with the untuned base, which task "
            f"{tasks.names[0]} did not score on plain questions; leave it out, or start that task "
            "again with evaluation.probe = true"
        )


def check_promotion(folder: RunFolder, config: RunConfig) -> None:
    """Refuse a result that has forgotten more than the run allows.

    Raises:
        FederationError: names the task, what was lost, and what to do.
    """
    tasks = read_history(folder).tasks
    if tasks is None:
        return
    problem = _find_problem(tasks, config)
    if problem:
        raise FederationError(
            f"task {config.task} is not promoted: {problem}; keep more by "
            "continual.replay_fraction, continual.penalty or continual.orthogonal and start the "
            "task again"
        )


def _find_problem(tasks: Tasks, config: RunConfig) -> str:
    """What is below its bound; empty if nothing is."""
    most = config.continual.max_forgetting
    if most is not None and tasks.forgotten:
        worst = max(tasks.forgotten, key=lambda name: tasks.forgotten[name])
        lost = tasks.forgotten[worst]
        if lost > most:
            return (
                f"{tasks.figure} on task {worst} fell by {lost:.3f} from its best, more than "
                f"continual.max_forgetting = {most:g}"
            )
    bound, general = config.continual.max_general_loss, tasks.general_loss
    if bound is not None and general is not None and general > bound:
        return (
            f"accuracy on plain questions fell by {general:.3f} from the untuned base's, more than "
            f"continual.max_general_loss = {bound:g}"
        )
    return ""
