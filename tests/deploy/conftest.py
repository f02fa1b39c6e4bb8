"""Resolved compose files: by the engine's own Compose where it is there, and read as text."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster import ROOT, render_cluster
from deploy.overlay import render_overlay
from tests.deploy.kits import make_federation, make_kit, unpack

Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Resolves the rendered file of so many sites, with a GPU overlay or without."""

    def resolve_sites(sites: int, devices: tuple[str, ...] = (), shared: bool = False) -> Any:
        files = [tmp_path / "compose.yml"]
        files[0].write_text(render_cluster(sites))
        if devices:
            files.append(tmp_path / "gpu.yml")
            files[1].write_text(render_overlay(sites, devices, shared=shared))
        options = [part for file in files for part in ("-f", str(file))]
        options += ["--project-directory", str(ROOT), "--profile", "*"]
        done = subprocess.run(
            ["docker", "compose", *options, "config", "--format", "json"],
            env={key: os.environ[key] for key in ("PATH", "HOME")}
            | ({"DEVICE": "cuda"} if devices else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return resolve_sites


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def archive(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kit(certs, tmp_path_factory.mktemp("kits"))


@pytest.fixture
def kit(archive: Path, tmp_path: Path) -> Path:
    return unpack(archive, tmp_path)
