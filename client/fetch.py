"""Fetch: a base model from the hub into the folder of models, before any record is near.

Run where there is a network and no data; the trainer later reads the folder without a network.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are public, not typed so
    disable_progress_bars,
    validate_repo_id,
)

from fedqlora.engine.base import HUB_FILES
from fedqlora.errors import ConfigError, ModelError
from fedqlora.files import sync_folder


def fetch(hub_id: str, models: Path) -> tuple[Path, bool]:
    """Download a model into `models/<hub id>`, unless it is there; returns folder and whether.

    The folder appears whole or not at all, and everybody can read it: weights are public.

    Args:
        hub_id: such as `google/flan-t5-base`, which runs then name it by too.
        models: folder of base models.

    Raises:
        ConfigError: that is not a hub id.
        ModelError: the hub cannot be reached or has no such model, the model has no
            safetensors, or the folder cannot be written.
    """
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise ConfigError(
            f"{hub_id[:200]!r} is not a hub id; write one such as google/flan-t5-base"
        ) from None
    folder = models / hub_id
    if folder.is_dir():
        return folder, False
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        models.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=models))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        _download(hub_id, building)
        if not any(building.glob("*.safetensors")):
            raise ModelError(f"{hub_id} has no *.safetensors on the hub; name a model that has")
        _publish(building, folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder, True


def _download(hub_id: str, folder: Path) -> None:
    """Fill an empty folder with config, weights and tokenizer."""
    try:
        huggingface_hub.snapshot_download(hub_id, local_dir=folder, allow_patterns=HUB_FILES)
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model {hub_id}, or does not show it to everybody; correct the id, or "
            "set HF_TOKEN where its owner granted access"
        ) from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unwritable(folder, error) from None
        raise ModelError(
            f"{hub_id} cannot be fetched from the hub ({type(error).__name__}); check that this "
            "machine reaches it and that HF_HUB_OFFLINE is not set, or copy the model's folder"
        ) from None


def _publish(building: Path, folder: Path) -> None:
    """Give a complete download its name."""
    shutil.rmtree(building / ".cache", ignore_errors=True)  # the hub client's own notes
    for path in building.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    building.chmod(0o755)
    folder.parent.mkdir(exist_ok=True)
    os.replace(building, folder)
    sync_folder(folder.parent)


def _unwritable(folder: Path, error: OSError) -> ModelError:
    return ModelError(f"{folder} cannot be written ({error.strerror}); free space or name another")
