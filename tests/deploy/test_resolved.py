"""What Compose itself makes of the rendered file, templates included; needs docker compose."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from typing import Any

import pytest

from deploy.cluster import ROOT
from tests.deploy.conftest import Resolve

pytestmark = pytest.mark.containers

ROLES = ("trainer", "supernode", "clientapp")
PUBLISHED = {"superlink": ["9092"]}


def volumes_of(service: dict[str, Any]) -> dict[str, str]:
    """Sources of a service's mounts, by target."""
    return {mount["target"]: mount["source"] for mount in service.get("volumes", [])}


def site_of(resolved: dict[str, Any], site: str) -> set[str]:
    """All that the services of a site mount: records, keys, state, sockets."""
    services = resolved["services"]
    found = {source for role in ROLES for source in volumes_of(services[f"{role}-{site}"]).values()}
    return found - {"models"}


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_records_keys_state_and_sockets_of_two_sites_are_disjoint(
    sites: int, resolve: Resolve
) -> None:
    resolved = resolve(sites)
    names = "abcde"[:sites]
    assert all(len(site_of(resolved, site)) == 8 for site in names)
    for one, other in itertools.combinations(names, 2):
        assert not site_of(resolved, one) & site_of(resolved, other)
    centre = {
        source
        for name in ("superlink", "serverapp", "evaluator", "enrol", "admin", "model")
        for source in volumes_of(resolved["services"][name]).values()
    }
    assert not centre & set().union(*(site_of(resolved, site) for site in names))


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_gpus_of_two_sites_are_disjoint_unless_shared_on_purpose(
    sites: int, resolve: Resolve
) -> None:
    def devices(resolved: dict[str, Any]) -> list[str]:
        return [
            device
            for service in resolved["services"].values()
            for part in service.get("deploy", {})
            .get("resources", {})
            .get("reservations", {})
            .get("devices", [])
            for device in part["device_ids"]
        ]

    own = devices(resolve(sites, tuple(map(str, range(sites + 1)))))
    assert len(own) == len(set(own)) == sites + 1
    assert devices(resolve(sites, ("MIG-7",), shared=True)) == ["MIG-7"] * (sites + 1)


def test_on_gpus_no_service_keeps_an_image_for_cpus(resolve: Resolve) -> None:
    services = resolve(2, ("0", "1", "2"))["services"]
    assert {service["image"].split(":")[1] for service in services.values()} == {"cuda"}
    for name in ("trainer-a", "trainer-b", "evaluator"):
        command = services[name]["command"]
        assert command[command.index("--device") + 1] == "cuda"
        assert any(mount.startswith("/tmp:") for mount in services[name]["tmpfs"])  # noqa: S108
        assert any("exec" in mount.split(",") for mount in services[name]["tmpfs"])


def test_only_the_superlink_publishes_and_only_its_fleet_port(resolve: Resolve) -> None:
    services = resolve(2)["services"]
    published = {
        name: [port["published"] for port in service["ports"]]
        for name, service in services.items()
        if service.get("ports")
    }
    assert published == PUBLISHED


def test_who_sees_records_has_no_network_and_nobody_else_has_records(resolve: Resolve) -> None:
    services = resolve(2)["services"]
    for name, service in services.items():
        records = {"/data", "/held-out"} & set(volumes_of(service))
        assert bool(records) == (name.startswith("trainer-") or name == "evaluator"), name
        if records or name == "bootstrap":
            assert service["network_mode"] == "none", name
            assert not service.get("networks"), name
        writable = {
            mount["target"] for mount in service.get("volumes", []) if not mount.get("read_only")
        }
        if name != "bootstrap":
            assert not writable & {"/data", "/held-out", "/keys", "/policy"}, name
            assert ("/models" in writable) == (name == "model"), name


def test_the_sites_networks_are_closed_and_join_only_the_superlink(resolve: Resolve) -> None:
    resolved = resolve(2)
    members: dict[str, set[str]] = {}
    for name, service in resolved["services"].items():
        for network in service.get("networks") or {}:
            members.setdefault(network, set()).add(name)
    assert members == {
        "fleet-a": {"superlink", "supernode-a"},
        "fleet-b": {"superlink", "supernode-b"},
        "clientapp-a": {"supernode-a", "clientapp-a"},
        "clientapp-b": {"supernode-b", "clientapp-b"},
        "control": {"superlink", "serverapp", "enrol", "admin", "certs"},
        "monitoring": {"superlink"},
        "published": {"superlink"},
        "outbound": {"model"},
    }
    for name in members.keys() - {"published", "outbound"}:
        network = resolved["networks"][name]
        assert network["internal"], name
        assert network["driver_opts"]["com.docker.network.bridge.inhibit_ipv4"] == "true", name


def test_what_monitors_the_centre_reaches_no_control_api_and_is_published_on_loopback_only() -> (
    None
):
    template = ROOT / "deploy" / "server" / "compose.yml"
    command = ["docker", "compose", "-f", str(template), "--profile", "monitoring"]
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        env={key: os.environ[key] for key in ("PATH", "HOME")},
        capture_output=True,
        text=True,
        check=True,
    )
    services = json.loads(done.stdout)["services"]
    assert set(services["metrics"]["networks"]) == {"monitoring"}
    assert set(services["prometheus"]["networks"]) == {"monitoring", "console"}
    assert [port["host_ip"] for port in services["prometheus"]["ports"]] == ["127.0.0.1"]
    assert "ports" not in services["metrics"]
    (runs,) = services["metrics"]["volumes"]
    assert runs["read_only"]


def test_every_service_is_hardened_and_bounded(resolve: Resolve) -> None:
    for name, service in resolve(2)["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"] == service["memswap_limit"], name
        assert int(service["pids_limit"]) <= 1024, name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
        assert service["sysctls"]["net.ipv4.conf.all.arp_ignore"] == "1", name
        assert service["restart"] in ("no", "unless-stopped"), name
        assert (service["restart"] == "no") != ("healthcheck" in service), name
