"""Base checkpoints: where the folder of a base model is, and the digest that names its content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub

from fedqlora.errors import ModelError

# What a tokenizer of any kind is made of, and what makes an answer differ.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
HUB_FILES = ["*.safetensors", "*.json", *TOKENIZER_FILES]
"""What is taken from a hub: no pickled weights, no code."""


def resolve_base(base: str, models: Path) -> Path:
    """The folder of a base model.

    Args:
        base: the name of a folder under `models`, or a hub id.
        models: the site's folder of models.

    Returns:
        `models/base` if that is a folder, else the hub snapshot (safetensors, JSON and
        tokenizer files only), downloaded if it is not cached.

    Raises:
        ModelError: neither is there, or `base` points outside `models`.
    """
    folder = models / base
    if folder.is_dir():
        if not folder.resolve().is_relative_to(models.resolve()):
            raise ModelError(
                f"model.base = {base[:200]!r} leaves the models folder; name one in it"
            )
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(base, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {base[:200]!r} is neither a folder under {models} nor on the hub "
            f"({type(error).__name__}); put its folder there or correct model.base"
        ) from error


def base_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and contents of a checkpoint's config, weights and tokenizer.

    Raises:
        ModelError: a file cannot be read, or there are no safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"base model {folder.name} has no *.safetensors; convert it first")
    names = ("config.json", *TOKENIZER_FILES)
    files = [*weights, *(folder / name for name in names if (folder / name).is_file())]
    digest = hashlib.sha256()
    try:
        for file in sorted(files, key=lambda path: path.name):
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name}\0{content}\n".encode())
    except OSError as error:
        raise ModelError(f"base model {folder.name} cannot be read ({error})") from error
    return digest.hexdigest()
