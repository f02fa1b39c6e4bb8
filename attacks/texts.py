"""Texts: what the attacker computes of candidate texts on the public base model.

Shape letters: T texts, D parameters of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, FloatArray
from fedqlora.engine.data import Record, Tokenized, tokenize
from fedqlora.engine.dp import unit_gradients
from fedqlora.engine.loss import compute_logits, plan_batches
from fedqlora.engine.model import BaseModel
from fedqlora.training_config import TrainingConfig

_AT_ONCE = 64
"""Texts whose gradients are held as tensors at one time."""


def read_rows(
    base: BaseModel, rows: Iterable[Mapping[str, object]], config: TrainingConfig
) -> list[Tokenized]:
    """Rows with `prompt` and `completion` as the sites' trainers tokenize them."""
    records = [
        Record(
            messages=None,
            prompt=str(row["prompt"]),
            completion=str(row["completion"]),
            patient="",
            fields={},
        )
        for row in rows
    ]
    return tokenize(records, base.tokenizer, base.family, config.max_length)


def text_losses(
    base: BaseModel, adapter: Adapter, texts: Sequence[Tokenized], config: TrainingConfig
) -> NDArray[np.float64]:
    """(T,) mean loss of a completion token of each text."""
    base.set_adapter(adapter)
    base.model.eval()
    losses = np.zeros(len(texts))
    with torch.no_grad():
        for batch in plan_batches(base, texts, config.model_copy(update={"packing": False})):
            logits = compute_logits(base, batch).float()
            each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            row = batch.keep // batch.inputs["input_ids"].shape[1]
            sums = torch.zeros(len(batch.rows)).index_add(0, row.cpu(), each.cpu())
            losses[list(batch.rows)] = sums / torch.bincount(row.cpu(), minlength=len(batch.rows))
    return losses


def text_gradients(
    base: BaseModel, adapter: Adapter, texts: Sequence[Tokenized], config: TrainingConfig
) -> NDArray[np.float64]:
    """(T, D) gradient of each text's mean token loss, places as in `flatten`."""
    base.set_adapter(adapter)
    base.model.eval()
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        units = [[text] for text in texts[start : start + _AT_ONCE]]
        gradients, _ = unit_gradients(base, units, config)
        parts.append(
            np.concatenate(
                [g.reshape(len(units), -1).cpu().numpy() for _, g in sorted(gradients.items())], 1
            )
        )
    return np.concatenate(parts).astype(np.float64)


def flatten(adapter: Mapping[str, FloatArray]) -> NDArray[np.float64]:
    """(D,) all values, tensors in the order of their names."""
    values = [value.reshape(-1) for _, value in sorted(adapter.items())]
    return np.concatenate(values).astype(np.float64)
