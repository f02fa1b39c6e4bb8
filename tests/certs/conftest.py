"""One small federation for all tests of certificates, and copies that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from certs.site import make_all


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of two sites and a SuperLink that is also known as fed.example.org; read only."""
    out = tmp_path_factory.mktemp("federation")
    make_all(out, ["a", "b"], ["fed.example.org"])
    return out


@pytest.fixture
def damaged(federation: Path, tmp_path: Path) -> Path:
    """A copy of the federation that a test may change."""
    out = tmp_path / "damaged"
    shutil.copytree(federation, out, symlinks=True)
    return out
