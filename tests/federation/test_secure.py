"""A run of three hospitals over TLS whose updates nobody sees: its end is that of a plain one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedqlora.config import RunConfig, validate
from fedqlora.secure.vector import Scale
from server.checkpoint import RunFolder
from server.metrics import Metrics
from tests.federation.conftest import Hospitals, running_hospitals

pytestmark = pytest.mark.slow
SITES = ("a", "b", "c")


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    with running_hospitals(tmp_path_factory.mktemp("secure"), SITES, masked=True) as running:
        yield running


def new_run(
    hospitals: Hospitals, *, enabled: bool, method: str = "fedavg", **sections: dict[str, object]
) -> RunFolder:
    config: dict[str, object] = {
        "name": "masked" if enabled else "plain",
        "model": {"base": "tiny-llama", "compute_dtype": "float32"},
        "lora": {"rank": 4},
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64},
        "data": {"validation_examples": 4},
        "federation": {"rounds": 2, "wait_seconds": 60, "min_sites": 3},
        "aggregation": {"method": method},
        "codec": {"update": "float32"},
        "secure_aggregation": {"enabled": enabled},
        **sections,
    }
    return RunFolder.create(hospitals.runs, validate(RunConfig, config, "test"))


def adapter(folder: RunFolder, round_: int) -> dict[str, np.ndarray]:
    return load_file(folder.path / "rounds" / f"{round_:04d}" / "adapter.safetensors")


def audit(hospitals: Hospitals, site: str) -> list[dict[str, object]]:
    path = hospitals.scratch / "processes" / f"trainer-{site}" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def permit(hospitals: Hospitals, site: str, more: str = "") -> None:
    """Require nothing any longer, add a section to the policy, start the trainer again."""
    policy = hospitals.scratch / f"{site}.toml"
    text = policy.read_text().replace("required = true", "required = false")
    policy.write_text(text + more)
    hospitals.federation.stop_process(f"trainer-{site}")
    hospitals.federation.start_process(f"trainer-{site}")


def test_a_masked_run_gives_the_plain_mean_and_a_plain_run_is_refused_by_policy(
    pinned: Hospitals,
) -> None:
    masked = new_run(pinned, enabled=True)
    result = pinned.run(masked)
    assert result.completed, masked.status()
    for round_ in (1, 2):
        lines = pinned.sites(masked, round_)
        assert {line["site"]: line["outcome"] for line in lines} == dict.fromkeys(SITES, "used")
        assert not any({"examples", "train_loss", "update_norm"} & line.keys() for line in lines)
    totals = [line for line in _lines(masked) if line["event"] == "round"]
    assert [line["examples"] for line in totals] == [24, 24]
    for site in SITES:
        events = [line["event"] for line in audit(pinned, site)]
        assert events[-4:] == ["training", "trained", "confirmed", "unmasked"]
        assert audit(pinned, site)[-3]["masked_with"] == "a,b,c"

    plain = new_run(pinned, enabled=False)
    assert not pinned.run(plain).completed
    assert "secure_aggregation.required" in str(plain.status()["error"])
    for site in SITES:
        permit(pinned, site)
    plain = new_run(pinned, enabled=False)
    assert pinned.run(plain).completed, plain.status()
    # Each of three values is rounded by up to a step, and weights are at their most.
    step = 1 / Scale.of(masked.config(), 3).steps
    for name, value in adapter(plain, 1).items():
        np.testing.assert_allclose(adapter(masked, 1)[name], value, rtol=2e-7, atol=step)
    for name, value in adapter(plain, 2).items():
        np.testing.assert_allclose(adapter(masked, 2)[name], value, atol=1e-4)


def test_an_encrypted_run_gives_the_plain_mean_and_only_the_named_site_decrypts(
    pinned: Hospitals,
) -> None:
    for site in SITES:
        permit(pinned, site, '[homomorphic_encryption]\nkey_sites = ["b"]\n')
    once: dict[str, object] = {"rounds": 1, "wait_seconds": 60, "min_sites": 3}
    encrypted = new_run(
        pinned,
        enabled=False,
        method="ffa",
        federation=once,
        homomorphic_encryption={"enabled": True, "key_site": "b"},
    )
    assert pinned.run(encrypted).completed, encrypted.status()
    plain = new_run(pinned, enabled=False, method="ffa", federation=once)
    assert pinned.run(plain).completed, plain.status()
    for name, value in adapter(plain, 1).items():
        np.testing.assert_allclose(adapter(encrypted, 1)[name], value, atol=1e-5)
    for site in SITES:
        events = {line["event"] for line in audit(pinned, site)}
        assert ("decrypted" in events, "wrapped" in events) == (site == "b", site == "b")
    assert [line["examples"] for line in _lines(encrypted) if line["event"] == "round"] == [24]


def _lines(folder: RunFolder) -> list[dict[str, object]]:
    return Metrics(Path(folder.path) / "metrics.jsonl").read()
