"""Rescore: a finished run's adapter and its untuned base on another held-out set.

What a hospital that took no part asks before it uses the adapter: how good is it on our texts?
"""

from __future__ import annotations

from pathlib import Path

from fedqlora.adapter import initial_adapter
from fedqlora.engine.base import resolve_base
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import load_held_out
from fedqlora.engine.model import BaseModel
from fedqlora.errors import CheckpointError
from server.checkpoint import RunFolder
from server.table import render


def rescore(folder: RunFolder, held_out: Path, models: Path) -> str:
    """The table of both on a held-out folder (engine/held_out.py); nothing is written.

    Args:
        folder: a finished run.
        held_out: the folder with the held-out set.
        models: folder of base models.

    Raises:
        FedqloraError: run, base model or held-out set cannot be used.
    """
    config, checkpoint = folder.config(), folder.latest()
    if checkpoint is None:
        raise CheckpointError(f"{folder.path} has no finished round; resume the run first")
    rows = load_held_out(held_out, config.evaluation.max_examples)
    base = BaseModel.load(resolve_base(config.model.base, models), config.model, config.lora)
    start = initial_adapter(base.spec(), config.seed, base.given())
    longest = config.evaluation.answer_tokens
    return render(
        {
            "untuned base": evaluate(base, start, rows, config.training, None, longest),
            "federated": evaluate(
                base, checkpoint.adapter, rows, config.training, checkpoint.residual, longest
            ),
        }
    )
