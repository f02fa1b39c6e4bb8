"""The base model that stays loaded between instructions: a second round loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fedqlora.config import ModelConfig
from fedqlora.engine.base import base_digest
from fedqlora.engine.model import BaseModel
from fedqlora.lora_config import LoraConfig


class WarmModel:
    """At most one loaded base model, replaced when another one is asked for.

    Args:
        device: where it computes; None takes a GPU where there is one.
        memory: free bytes of each GPU that a base is spread over; None: all on `device`.
    """

    def __init__(
        self, device: torch.device | None = None, memory: Mapping[int, int] | None = None
    ) -> None:
        self._device = device
        self._memory = memory
        self._key: tuple[Path, ModelConfig, LoraConfig] | None = None
        self._base: BaseModel | None = None
        self._digests: dict[Path, tuple[tuple[tuple[str, int, int], ...], str]] = {}

    def digest(self, folder: Path) -> str:
        """Digest of a base model's files, computed again only if a file changed."""
        stats = ((path, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
        seen = tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
        if folder not in self._digests or self._digests[folder][0] != seen:
            self._digests[folder] = (seen, base_digest(folder))
        return self._digests[folder][1]

    def get(self, folder: Path, model: ModelConfig, lora: LoraConfig) -> BaseModel:
        """The loaded base with an adapter of this configuration.

        Raises:
            ModelError: it cannot be loaded or cannot carry the adapter.
        """
        key = (folder, model, lora)
        if self._base is None or self._key != key:
            # Freed before the next one is loaded: two would not fit beside each other.
            self._base, self._key = None, None
            self._base = BaseModel.load(folder, model, lora, self._device, self._memory)
            self._key = key
        return self._base
