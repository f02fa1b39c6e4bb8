"""Benchmarks of a run's exported model by lm-evaluation-harness, whose figures others know.

Its own tasks by name, which mostly read the hub, and the held-out set as multiple-choice tasks that
read nothing but the folder: `heldout_<file>_<field>` for each field of choices.json with at most
50 options. There `acc` takes the option with the highest summed log-probability over the
vocabulary, and `acc_norm` the highest per character; our own scores (engine/scoring.py) compare
options among each other, token by token, so they are not the same figures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.files import write_durably
from server.table import align

_MOST_OPTIONS = 50
"""Every option of every row is a pass of the model."""
_FIGURES = ("acc", "acc_norm", "exact_match", "bleu", "rougeL", "word_perplexity", "perplexity")
Row = dict[str, Any]


def benchmark_model(
    model: Path, tasks: Sequence[str], held_out: Path | None, limit: int | None, device: str
) -> str:
    """Run the tasks; writes `benchmark.json` beside the model's folder and returns a table.

    Args:
        model: the exported checkpoint.
        tasks: names that lm-evaluation-harness knows.
        held_out: a held-out folder whose fields are tasks too; None for none.
        limit: at most so many rows of each task.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the package is missing, a task is not known or its data not reachable, or
            there is nothing to run.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "lm-evaluation-harness is not installed; run `pip install 'fedqlora[benchmark]'`"
        ) from None
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks:
            raise ConfigError(f"lm-evaluation-harness has no task {task}; correct TASKS")
    own = [] if held_out is None else describe_tasks(load_held_out(held_out))
    if not own and not tasks:
        raise ConfigError(
            f"{held_out} has no field with at most {_MOST_OPTIONS} options; name tasks of "
            "lm-evaluation-harness by TASKS"
        )
    try:
        found = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(model),
                "dtype": "auto" if device == "cuda" else "float32",
            },
            tasks=[*own, *tasks],
            limit=limit,
            device=device,
            batch_size=16,
            task_manager=manager,
            log_samples=False,
        )
    except FedqloraError:
        raise
    except Exception as error:
        # Whatever a task's loader raises: mostly that no hub is reached.
        raise ConfigError(
            f"lm-evaluation-harness could not run {', '.join(tasks) or 'the held-out set'} "
            f"({type(error).__name__}); a task of its own reads the hub, so it needs a network "
            "or a filled cache"
        ) from error
    assert found is not None  # noqa: S101 - only other ranks of a distributed run get nothing
    results: dict[str, dict[str, Any]] = found["results"]
    path = model.parent / "benchmark.json"
    write_durably(path, json.dumps({"tasks": results}, indent=1, default=str).encode() + b"\n")
    return f"{render(results)}\n\nbenchmark: {path}"


def describe_tasks(held_out: HeldOut) -> list[dict[str, Any]]:
    """The held-out set as tasks of lm-evaluation-harness, one a file and field."""
    tasks = []
    for subset, records in held_out.subsets.items():
        for field, options in held_out.choices.items():
            if len(options) > _MOST_OPTIONS:
                continue
            rows: list[Row] = [
                {
                    "text": record.prompt,
                    "options": list(options),
                    "right": options.index(record.fields[field]),
                }
                for record in records
            ]
            first = records[0].completion
            tasks.append(
                {
                    "task": f"heldout_{subset}_{field}".replace("-", "_"),
                    "custom_dataset": _load(rows),
                    "test_split": "test",
                    "output_type": "multiple_choice",
                    "doc_to_text": "{{text}}",
                    "doc_to_choice": "{{options}}",
                    "doc_to_target": "right",
                    "target_delimiter": first[: len(first) - len(first.lstrip())],
                    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
                }
            )
    return tasks


def render(results: dict[str, dict[str, Any]]) -> str:
    """A row for each task and figure, with its standard error."""
    rows = [["task", "figure", "value", "standard error"]]
    for task, figures in results.items():
        for name, value in figures.items():
            figure, _, filter_ = name.partition(",")
            if figure not in _FIGURES or not isinstance(value, int | float):
                continue
            error = figures.get(f"{figure}_stderr,{filter_}")
            told = f"{error:.3f}" if isinstance(error, int | float) else ""
            rows.append([task, figure, f"{value:.3f}", told])
    return align(rows)


def _load(rows: list[Row]) -> Callable[..., Any]:
    """What the harness calls for the rows; nothing is written to a cache."""

    def load(**_: object) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(rows)})

    return load
