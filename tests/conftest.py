"""How all tests run. Before anything imports torch: tiny models are fastest on one thread."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Deals files to workers whole, those that share a federation of processes to one worker."""
    shared = {
        item.path: federation
        for item in items
        for federation in ("hospitals", "federation")
        if federation in item.fixturenames
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group(shared.get(item.path, str(item.path))))
