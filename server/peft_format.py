"""The finished adapter in PEFT's own format, written without torch.

PEFT loads it with `PeftModel.from_pretrained(base, folder)`: a configuration file and the
tensors under the names that they had all along. A residual is written into the same A and B,
below and beside the trained rows and columns.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from fedqlora.adapter import A_PART, Adapter, FloatArray, rank_of
from fedqlora.config import RunConfig
from fedqlora.errors import CheckpointError
from fedqlora.files import replace_folder
from server.checkpoint import Checkpoint

_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def write_adapter(folder: Path, config: RunConfig, checkpoint: Checkpoint, card: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md, all or none.

    Args:
        folder: replaced if it exists.
        config: the run.
        checkpoint: whose adapter to write.
        card: the model card, as README.md.

    Raises:
        CheckpointError: it cannot be written.
    """
    settings = json.dumps(peft_config(config, checkpoint), indent=2).encode() + b"\n"
    # transformers refuses a file that does not name the framework of its layout.
    joined = join_residual(checkpoint.adapter, checkpoint.residual, config.lora.scale)
    tensors = safetensors.numpy.save(joined, metadata={"format": "pt"})
    try:
        replace_folder(
            folder,
            {
                "adapter_config.json": settings,
                "adapter_model.safetensors": tensors,
                "README.md": card.encode(),
            },
        )
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); free space, then resume the run"
        ) from None


def join_residual(adapter: Adapter, residual: Adapter, scale: float) -> Adapter:
    """One adapter with the function of both, of the rank of both together.

    Args:
        adapter: its product counts with `scale`.
        residual: its product counts with 1; empty for none.
        scale: of the result, too.
    """
    rank = rank_of(residual)
    if rank == 0:
        return adapter
    joined: Adapter = {}
    for name, value in adapter.items():
        axis = 0 if A_PART in name else 1
        part = residual[name] if axis == 0 else residual[name] / np.float32(scale)
        joined[name] = np.concatenate((value, part, _zeros(part, rank, axis)), axis=axis)
    return joined


def _zeros(part: FloatArray, rank: int, axis: int) -> FloatArray:
    """What a layer's residual lacks of the largest layer's rank."""
    shape = list(part.shape)
    shape[axis] = rank - part.shape[axis]
    return np.zeros(shape, dtype=np.float32)


def peft_config(config: RunConfig, checkpoint: Checkpoint) -> dict[str, object]:
    """PEFT's configuration of this adapter (LoraConfig of peft 0.21)."""
    residual_rank = rank_of(checkpoint.residual)
    lora = config.lora.at_rank(config.lora.rank + residual_rank) if residual_rank else config.lora
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[checkpoint.origin.family],
        "base_model_name_or_path": config.model.base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(_modules(checkpoint)),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _modules(checkpoint: Checkpoint) -> set[str]:
    """Last names of the modules that carry an adapter, such as q_proj."""
    ending = ".lora_A.weight"
    return {
        name.removesuffix(ending).rsplit(".", 1)[-1]
        for name in checkpoint.adapter
        if name.endswith(ending)
    }
