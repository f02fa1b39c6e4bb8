"""The demo's hospitals: what their policies approve for open, masked and encrypted runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.policy import Policy, load_policy
from demo.hospitals import Hospitals
from fedqlora.config import RunConfig, validate

SUMS: dict[str, dict[str, dict[str, object]]] = {
    "open": {},
    "masked": {"secure_aggregation": {"enabled": True}},
    "encrypted": {"homomorphic_encryption": {"enabled": True, "key_site": "b"}},
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Policy]]:
    """The three hospitals' policies for each kind of run, in one home."""
    home = tmp_path_factory.mktemp("home")
    found = {}
    for kind, sections in SUMS.items():
        values = {
            "model": {"base": "tiny-llama"},
            "aggregation": {"method": "ffa"},
            "federation": {"min_sites": 3},
            **sections,
        }
        hospitals = Hospitals(validate(RunConfig, values, "test"), 3, home, simulated=True)
        hospitals.prepare()
        found[kind] = [load_policy(Path(str(site.policy))) for site in hospitals.sites()]
    return found


def test_hospitals_pin_each_other_where_only_a_sum_is_opened(
    policies: dict[str, list[Policy]],
) -> None:
    pinned = {kind: [set(one.peers) for one in found] for kind, found in policies.items()}
    everybody = [{"a", "b", "c"}] * 3
    assert pinned == {"open": [set()] * 3, "masked": everybody, "encrypted": everybody}


def test_hospitals_name_the_key_site_of_an_encrypted_run_alone(
    policies: dict[str, list[Policy]],
) -> None:
    named = {kind: [one.homomorphic_encryption.key_sites for one in found]
             for kind, found in policies.items()}  # fmt: skip
    assert named == {"open": [()] * 3, "masked": [()] * 3, "encrypted": [("b",)] * 3}
