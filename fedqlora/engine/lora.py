"""LoRA: the adapter put on a base model's linear layers, and the residual beside it.

Guarantees: an adapter is on the chosen layers and on nothing else; each is a pair of matrices of
the configured rank, which is what aggregation and per-example gradients are exact for.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from fedqlora.engine.architectures import architecture_of
from fedqlora.engine.pretrained import Family
from fedqlora.errors import ModelError
from fedqlora.lora_config import LoraConfig

ADAPTER, RESIDUAL = "default", "residual"


def choose_layers(base: Any, lora: LoraConfig) -> list[str]:
    """Full names of the linear layers that get an adapter, in the model's order.

    Raises:
        ModelError: names a target that the model lacks, or a module that is not a linear layer.
    """
    modules = dict(base.named_modules())
    head = base.get_output_embeddings()
    linear = {
        name: module
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if isinstance(lora.targets, str):
        own = architecture_of(base.config.model_type).targets if lora.targets == "auto" else ()
        return [name for name in linear if not own or name.rpartition(".")[2] in own]
    missing = [t for t in lora.targets if not any(f".{name}".endswith(f".{t}") for name in modules)]
    if missing:
        raise ModelError(
            f"lora.targets names layers that {type(base).__name__} lacks: "
            f"{', '.join(missing)}; name its own or use auto"
        )
    wanted = [n for n in modules if any(f".{n}".endswith(f".{t}") for t in lora.targets)]
    for name in wanted:
        if name not in linear:
            what = (
                "the output head" if modules[name] is head else f"a {type(modules[name]).__name__}"
            )
            raise ModelError(
                f"{name} is {what}, which cannot carry the adapter; name linear layers in "
                "lora.targets or use auto"
            )
    return wanted


def add_adapter(base: Any, lora: LoraConfig, family: Family) -> Any:
    """The PEFT model of a base with the adapter on it.

    Raises:
        ModelError: names the layer that cannot carry it.
    """
    layers = choose_layers(base, lora)
    transposed = any(isinstance(base.get_submodule(name), Conv1D) for name in layers)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if family == "seq2seq" else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # any number works
        lora_dropout=lora.dropout,
        target_modules=layers,
        fan_in_fan_out=transposed,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            # PEFT 0.21.2 reads a property that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            # Of an adapter that it puts on fused experts unasked; refused below.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            tuned = peft.get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"{type(base).__name__} cannot carry the adapter ({reason}); change lora.targets"
        ) from error
    carrying = [n for n, m in tuned.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    for name in carrying:
        # PEFT 0.21 turns `gate_proj` and the like into the fused experts of the same block.
        if name not in layers:
            raise ModelError(
                f"{name} is a fused block of experts, whose adapter would not be two matrices; "
                "leave the experts' layers out of lora.targets or use auto"
            )
    return tuned


def adapter_tensors(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters under the names of PEFT's state dict, sorted by name."""
    tensors = named_tensors(model, ADAPTER)
    if sum(p.requires_grad for p in model.parameters()) != len(tensors):
        raise ModelError("a weight of the base model is trainable; report this as a bug")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ModelError("the adapter's weights are not float32; report this as a bug")
    return tensors


def named_tensors(model: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """One adapter's parameters under the names of PEFT's state dict, sorted by name."""
    by_address = {p.data_ptr(): p for p in model.parameters()}
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: by_address[state[name].data_ptr()] for name in sorted(state)}


def replace_residual(model: Any, rank: int) -> None:
    """Take the residual adapter away, and put one of another rank there unless that is 0."""
    if RESIDUAL in model.peft_config:
        model.base_model.set_adapter(ADAPTER)
        model.delete_adapter(RESIDUAL)
    if rank > 0:
        config = copy.deepcopy(model.peft_config[ADAPTER])
        config.r = config.lora_alpha = rank
        config.lora_dropout, config.use_rslora = 0.0, False
        model.add_adapter(RESIDUAL, config)
