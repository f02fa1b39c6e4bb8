"""Tiny models, loaded with an adapter, and examples for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedqlora.adapter import Adapter, initial_adapter
from fedqlora.config import ModelConfig
from fedqlora.engine.data import Tokenized
from fedqlora.engine.model import BaseModel
from fedqlora.lora_config import LoraConfig
from tests.tiny_models import save_llama, save_mamba, save_t5


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="session")
def mamba_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mamba(tmp_path_factory.mktemp("models") / "tiny-mamba")


def load(folder: Path, *, nf4: bool = True, **lora: object) -> BaseModel:
    return BaseModel.load(
        folder,
        ModelConfig(base=folder.name, quantization="nf4" if nf4 else "none",
                    compute_dtype="float32"),
        LoraConfig.model_validate({"rank": 4, **lora}),
    )  # fmt: skip


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> BaseModel:
    return load(llama_folder)


@pytest.fixture(scope="session")
def t5(t5_folder: Path) -> BaseModel:
    return load(t5_folder)


@pytest.fixture(scope="session")
def start() -> Callable[[BaseModel], Adapter]:
    return lambda base: initial_adapter(base.spec(), 1, base.given())


@pytest.fixture(scope="session")
def examples() -> list[Tokenized]:
    """Twelve examples of unequal length; the completion repeats the prompt's first token."""
    return [
        Tokenized(tuple(3 + (7 * i + j) % 60 for j in range(3 + 2 * i)), (3 + 7 * i % 60, 5, 1))
        for i in range(12)
    ]
