"""One cluster of two sites for all tests of containers; it needs a container engine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from fedqlora.address import find_free_port
from tests.containers.cluster import Cluster


@pytest.fixture(scope="session", autouse=True)
def _engine() -> None:
    """Fails with one sentence where no engine answers."""
    answer = subprocess.run(["docker", "info"], capture_output=True, check=False)
    if answer.returncode:
        pytest.fail("no container engine answers: start Docker, or leave `containers` tests out")


@pytest.fixture(scope="session")
def cluster(_engine: None) -> Iterator[Cluster]:
    """Aggregator and sites a and b, up and healthy; removed again at the end."""
    made = Cluster(2, "fedqlora-test", find_free_port())
    made.make("down")
    try:
        made.make("up")
        yield made
    finally:
        made.make("down")
