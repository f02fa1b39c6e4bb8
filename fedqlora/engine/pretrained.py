"""Pretrained: a base model and its tokenizer read from a folder, quantized on the way in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from fedqlora.engine.architectures import architecture_of
from fedqlora.engine.placement import place
from fedqlora.errors import ModelError

Family = Literal["causal", "seq2seq"]


def load_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantized: bool,
    memory: Mapping[int, int] | None = None,
) -> tuple[Any, Any, Family]:
    """Load (model, tokenizer, family) from a folder: safetensors only, no code of the model's.

    Args:
        folder: a checkpoint folder.
        dtype: of what is not in 4 bits.
        device: where it computes.
        quantized: whether linear layers are put into 4 bits.
        memory: free bytes of each GPU that it is spread over; None puts all of it on `device`.

    Raises:
        ModelError: the folder holds no usable checkpoint or tokenizer, or it does not fit.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"base model {folder.name} is already quantized; name the unquantized checkpoint"
            )
        architecture = architecture_of(config.model_type)
        config.update(dict(architecture.settings))
        family: Family = "seq2seq" if config.is_encoder_decoder else "causal"
        auto = (
            transformers.AutoModelForSeq2SeqLM
            if family == "seq2seq"
            else transformers.AutoModelForCausalLM
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        places: dict[str, Any] = {"": device}
        if memory is not None:
            kept = architecture.unquantized
            places = {
                **place(auto, config, memory, dtype=dtype, quantized=quantized, unquantized=kept)
            }
        model = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=places,
            quantization_config=_nf4(dtype, architecture.unquantized) if quantized else None,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"base model {folder.name} cannot be loaded ({reason}); give a folder with "
            "config.json, *.safetensors and the tokenizer's files"
        ) from error
    return model, tokenizer, family


def _nf4(dtype: torch.dtype, unquantized: tuple[str, ...]) -> transformers.BitsAndBytesConfig:
    """QLoRA's 4 bits."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(unquantized) or None,
    )


def choose_dtype(name: Literal["auto", "bfloat16", "float32"], device: torch.device) -> torch.dtype:
    """The dtype that `ModelConfig.compute_dtype` means on this device."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = torch.cpu.get_capabilities()
            native = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
        name = "bfloat16" if native else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32
