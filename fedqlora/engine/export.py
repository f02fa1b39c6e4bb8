"""Export: an adapter merged into its unquantized base, and answers of base and tuned model.

An adapter is never merged into 4-bit weights: rounding would lose it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from fedqlora.engine.architectures import architecture_of
from fedqlora.engine.pretrained import load_checkpoint
from fedqlora.errors import CheckpointError, ModelError


def merge(folder: Path, adapter_folder: Path, out: Path) -> None:
    """Write the base with the adapter merged in as a standard checkpoint.

    Merged in float32, saved in the base's own dtype. `out` appears only when it is complete.

    Args:
        folder: the base model's folder.
        adapter_folder: an adapter in PEFT's format.
        out: the folder to make; must not exist.

    Raises:
        ModelError: base or adapter cannot be loaded, do not fit each other, or cannot be merged.
        CheckpointError: `out` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; name a new folder or remove it")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, tokenizer = _load_tuned(folder, adapter_folder, torch.device("cpu"))
    _check_mergeable(model)
    merged = model.merge_and_unload(safe_merge=True).to(config.dtype or torch.float32)
    # What training needed otherwise is the base's own again.
    changed = architecture_of(config.model_type).settings
    merged.config.update({name: getattr(config, name) for name in changed})
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror or error}); free space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def answer(
    folder: Path, adapter_folder: Path, prompt: str, max_new_tokens: int = 64
) -> tuple[str, str]:
    """What the base and the tuned model answer to a prompt, decoded greedily.

    The prompt is taken as it is, as in training on a `prompt` column.

    Args:
        folder: the base model's folder.
        adapter_folder: an adapter in PEFT's format.
        prompt: the text to answer.
        max_new_tokens: longest answer.

    Returns:
        (the base's answer, the tuned model's answer).

    Raises:
        ModelError: base or adapter cannot be loaded, or do not fit each other.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = _load_tuned(folder, adapter_folder, device)
    model.eval()
    with model.disable_adapter():
        base = _generate(model, tokenizer, prompt, max_new_tokens)
    return base, _generate(model, tokenizer, prompt, max_new_tokens)


def _load_tuned(folder: Path, adapter_folder: Path, device: torch.device) -> tuple[Any, Any]:
    """(the unquantized base in float32 with the adapter on it, its tokenizer)."""
    base, tokenizer, _ = load_checkpoint(
        folder, dtype=torch.float32, device=device, quantized=False
    )
    if not (adapter_folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{adapter_folder} holds no adapter_model.safetensors; name a finished run's adapter"
        )
    try:
        with warnings.catch_warnings():
            # PEFT 0.21.2 reads a property that transformers 5.23 has renamed, and reports a
            # name that does not fit only by a warning.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            # GPT-2's layers are stored transposed, which PEFT sees and mends by itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(base, adapter_folder)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, UserWarning) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"the adapter in {adapter_folder} does not fit base model {folder.name} ({reason}); "
            "name the base that it was trained on"
        ) from error
    return model, tokenizer


def _check_mergeable(model: Any) -> None:
    """Refuse two adapters on one weight, which would both be added to it for both places."""
    modules = model.get_base_model().named_modules()
    layers: dict[str, Any] = {name: m for name, m in modules if isinstance(m, LoraLayer)}
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        other = seen.setdefault(layer.get_base_layer().weight.data_ptr(), name)
        if other != name:
            raise ModelError(
                f"{other} and {name} share one weight, into which their two adapters cannot be "
                "merged; load the adapter beside the base with PEFT instead"
            )


def _generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The greedy answer, without the prompt and special tokens."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    encoder_decoder = model.config.is_encoder_decoder
    if not encoder_decoder and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    inputs = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
    new = output if encoder_decoder else output[len(ids) :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()
