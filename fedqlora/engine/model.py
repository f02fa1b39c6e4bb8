"""BaseModel: a frozen, usually 4-bit base model with a LoRA adapter on it, kept warm.

QLoRA (arXiv 2305.14314): the base is quantized to NF4 with double quantization, the adapter's
master weights are float32. Loaded once per process: every round, evaluation and experiment
sets another adapter on the same base.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.helpers import disable_input_dtype_casting

from fedqlora.adapter import Adapter, AdapterSpec, check_residual, check_update, rank_of
from fedqlora.config import ModelConfig
from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.engine.device import choose_device
from fedqlora.engine.lora import (
    ADAPTER,
    RESIDUAL,
    adapter_tensors,
    add_adapter,
    named_tensors,
    replace_residual,
)
from fedqlora.engine.pretrained import Family, choose_dtype, load_checkpoint
from fedqlora.lora_config import LoraConfig

__all__ = ["BaseModel", "Family", "base_digest", "resolve_base"]

logger = logging.getLogger("fedqlora")


class BaseModel:
    """A base model with its adapter, loaded once.

    Attributes:
        model: the PEFT model; only adapter tensors are trainable.
        tokenizer: the base's own tokenizer.
        family: `causal` or `seq2seq`, from the base's config.
        folder: where the base was loaded from.
        device: where it computes; of a spread model, where it takes its inputs.
        compute_dtype: what matrices are multiplied in.
        packs: filled by the first batch: whether packed examples stay apart (batch.py).
        separable: set by dp.py once examples' gradients were seen to be told apart exactly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        family: Family,
        folder: Path,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.folder = folder
        self.device = device
        self.compute_dtype = compute_dtype
        self.packs: bool | None = None
        self._residual_rank = 0
        self.separable = False
        self._tensors = adapter_tensors(model)
        self._given = {
            name: value.copy()
            for name, value in self.get_adapter().items()
            if ".lora_A." not in name and ".lora_B." not in name
        }

    @classmethod
    def load(
        cls,
        folder: Path,
        model: ModelConfig,
        lora: LoraConfig,
        device: torch.device | None = None,
        memory: Mapping[int, int] | None = None,
    ) -> BaseModel:
        """Load, quantize and prepare a base model.

        The class follows from the base's config: an encoder-decoder (T5, BART) is loaded as a
        sequence-to-sequence model, everything else as a causal one. Only safetensors are
        read, and no code that comes with a model is run.

        Args:
            folder: a checkpoint folder, from `resolve_base`.
            model: quantization and compute type.
            lora: the adapter.
            device: where it computes; None takes a GPU where there is one.
            memory: free bytes of each GPU that the base is spread over; None: all on `device`.

        Raises:
            ModelError: the folder holds no usable checkpoint or tokenizer, the base does not fit,
                or it lacks a layer that the adapter targets.
        """
        device = choose_device() if device is None else device
        dtype = choose_dtype(model.compute_dtype, device)
        base, tokenizer, family = load_checkpoint(
            folder,
            dtype=dtype,
            device=device,
            quantized=model.quantization == "nf4",
            memory=memory,
        )
        for module in base.modules():
            if isinstance(module, Linear4bit):
                # Otherwise the first evaluation on a CPU with AVX512-BF16 repacks the weights in
                # place, and training afterwards loses the gradient through the base.
                module.support_avx512bf16_for_cpu = False
        tuned = add_adapter(base, lora, family)
        logger.info(
            "base model %s: %s, %s, %s on %s, %d adapter parameters",
            folder.name,
            type(base).__name__,
            model.quantization,
            str(dtype).removeprefix("torch."),
            device.type,
            sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        )
        return cls(tuned, tokenizer, family, folder, device, dtype)

    @property
    def gpus(self) -> list[torch.device]:
        """Every GPU that holds a part of it."""
        used = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        return sorted(used, key=str)

    def spec(self) -> AdapterSpec:
        """Names and shapes of the adapter on this base."""
        return AdapterSpec(
            shapes=tuple((name, tuple(tensor.shape)) for name, tensor in self._tensors.items())
        )

    def get_adapter(self) -> Adapter:
        """A float32 copy of the adapter's tensors, by PEFT's names."""
        return {
            name: tensor.detach().cpu().numpy().copy() for name, tensor in self._tensors.items()
        }

    def set_adapter(
        self,
        adapter: Adapter,
        residual: Adapter | None = None,
        trained: Collection[str] | None = None,
    ) -> None:
        """Put these values into the adapter, and nothing else beside it than the residual.

        Args:
            adapter: values of every tensor.
            residual: a frozen adapter on the same layers whose product counts with scale 1;
                None or empty for none.
            trained: names of the tensors that may change in training; None for all.

        Raises:
            UpdateError: a name or shape is not the adapter's, or a value is not finite.
        """
        check_update(adapter, self.spec(), max_norm=float("inf"))
        check_residual(residual or {}, self.spec(), max_rank=sys.maxsize)
        self._set_residual(residual or {})
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(adapter[name])))
                tensor.requires_grad_(trained is None or name in trained)

    def _set_residual(self, residual: Adapter) -> None:
        """Load a checked residual as a second active adapter, in place of the last one."""
        rank = rank_of(residual)
        if rank != self._residual_rank:
            replace_residual(self.model, rank)
            self._residual_rank = rank
        if rank == 0:
            return
        # This makes the tensors of both adapters trainable.
        self.model.base_model.set_adapter([ADAPTER, RESIDUAL])
        with torch.no_grad():
            for name, tensor in named_tensors(self.model, RESIDUAL).items():
                tensor.requires_grad_(False)
                value = torch.from_numpy(np.ascontiguousarray(residual[name]))
                tensor.zero_()
                tensor[: value.shape[0], : value.shape[1]].copy_(value)

    def given(self) -> Adapter:
        """Starting values of the tensors that are neither A nor B (DoRA's magnitudes).

        They depend on the base model only, as PEFT starts with B = 0.
        """
        return {name: value.copy() for name, value in self._given.items()}

    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """All of the adapter's parameters, by PEFT's names, in sorted order."""
        return dict(self._tensors)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters that train now, by PEFT's names, in sorted order."""
        return {name: p for name, p in self._tensors.items() if p.requires_grad}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the model in its compute type: bfloat16 autocast, or plain float32.

        Autocast already casts the adapter's float32 weights, so PEFT need not cast every
        layer's input up to float32 and back (measured: about 2 % of a step).
        """
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        )
        with disable_input_dtype_casting(self.model), autocast:
            yield

    def frozen_digest(self) -> str:
        """SHA-256 over the bytes of the base's tensors, 4-bit codes and their scales included."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            tensors = [parameter.data]
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [state.absmax, state.code]
                if state.nested:
                    tensors += [state.offset, state.state2.absmax, state.state2.code]
            digest.update(name.encode())
            for tensor in tensors:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
