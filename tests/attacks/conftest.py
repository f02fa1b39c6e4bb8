"""A tiny random model, and texts of made-up words for sites on it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from attacks.setting import Setting
from attacks.sites import Rows
from tests.tiny_models import WORDS, save_llama

EPSILON = 1.0


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "tiny-llama")
    return folder


@pytest.fixture
def setting(models: Path, tmp_path: Path) -> Setting:
    return Setting(folder=tmp_path, models=models, base="tiny-llama", epsilon=EPSILON)


def make_rows(
    site: str, count: int, seed: int, words: list[str] = WORDS, longest: tuple[int, int] = (3, 3)
) -> Rows:
    """Texts of random words, a patient each."""
    generator = random.Random(f"{site}{seed}")  # noqa: S311 - made-up texts

    def draw(length: int) -> str:
        return " ".join(generator.choices(words, k=length))

    return [
        {"prompt": draw(longest[0]), "completion": draw(longest[1]), "patient_id": f"{site}{i}"}
        for i in range(count)
    ]
