"""The boundary, seen from inside each container: who reaches what, and who holds what."""

from __future__ import annotations

import json

import pytest

from tests.containers.cluster import SITE_SERVICES, Cluster

pytestmark = pytest.mark.containers

REACH = """
import json, socket
def reach(address):
    try:
        socket.create_connection(address, 2).close()
        return True
    except OSError:
        return False
print(json.dumps([address for address in map(tuple, json.loads('{targets}')) if reach(address)]))
"""
RESOLVE = """
import json, socket
def resolve(name):
    try:
        return bool(socket.getaddrinfo(name, 80))
    except OSError:
        return False
print(json.dumps([name for name in json.loads('{names}') if resolve(name)]))
"""
INTERFACES = "import json, os; print(json.dumps(sorted(os.listdir('/sys/class/net'))))"
WRITE = """
import json
def write(folder):
    try:
        open(folder + "/written", "w").close()
        return True
    except OSError:
        return False
print(json.dumps([folder for folder in json.loads('{folders}') if write(folder)]))
"""
STATUS = """
import json
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({name: lines[name].split() for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}))
"""


def reachable(cluster: Cluster, service: str, targets: list[tuple[str, int]]) -> list[object]:
    """Those addresses that a service can open a TCP connection to."""
    program = REACH.replace("{targets}", json.dumps(targets))
    return [tuple(found) for found in cluster.python(service, program)]


def everybody(cluster: Cluster) -> dict[str, list[tuple[str, int]]]:
    """Every listener of the cluster by its name, under each of its addresses."""
    ports = {"superlink": (9092, 8000)} | {f"supernode-{site}": (9094,) for site in cluster.names}
    found = {
        f"{service}:{port}@{network}": [(address, port)]
        for service, listening in ports.items()
        for network, address in cluster.addresses(service).items()
        for port in listening
    }
    networks = {name for service in ports for name in cluster.addresses(service)}
    for network in networks:
        described = json.loads(cluster.docker("network", "inspect", f"{cluster.project}_{network}"))
        gateway = described[0]["IPAM"]["Config"][0].get("Gateway")
        if gateway:
            found[f"host@{network}"] = [(gateway.split("/")[0], port) for port in (22, 9092, 2375)]
    return found


def names_of(cluster: Cluster, service: str) -> set[str]:
    """Which of all listeners a service reaches."""
    return {
        name for name, targets in everybody(cluster).items() if reachable(cluster, service, targets)
    }


def test_the_listeners_exist_and_whoever_is_in_their_network_reaches_them(
    cluster: Cluster,
) -> None:
    """The attacks below fail because of the networks, not because nobody listens."""
    control = cluster.addresses("superlink")["control"]
    assert reachable(cluster, "serverapp", [(control, 8000)]) == [(control, 8000)]
    own = cluster.addresses("supernode-b")["clientapp-b"]
    assert reachable(cluster, "clientapp-b", [(own, 9094)]) == [(own, 9094)]


@pytest.mark.parametrize("service", ["trainer-a", "evaluator"])
def test_who_sees_records_has_no_network_at_all(cluster: Cluster, service: str) -> None:
    assert cluster.python(service, INTERFACES) == ["lo"]
    assert "eth0" in cluster.python("supernode-a", INTERFACES)


def test_the_clientapp_reaches_its_supernode_and_nobody_else(cluster: Cluster) -> None:
    assert names_of(cluster, "clientapp-a") == {"supernode-a:9094@clientapp-a"}


def test_the_supernode_reaches_the_aggregators_fleet_api_and_nobody_else(cluster: Cluster) -> None:
    own = {"supernode-a:9094@clientapp-a"}  # its own listener
    assert names_of(cluster, "supernode-a") - own == {"superlink:9092@fleet-a"}


@pytest.mark.parametrize("service", ["supernode-a", "clientapp-a", "serverapp", "superlink"])
def test_nothing_outside_has_a_name_or_can_be_reached(cluster: Cluster, service: str) -> None:
    names = ["example.com", "www.example.org", "trainer-a", "host.docker.internal"]
    assert cluster.python(service, RESOLVE.replace("{names}", json.dumps(names))) == []
    # Documentation addresses answer nobody, so a public resolver stands for the outside.
    assert reachable(cluster, service, [("1.1.1.1", 53), ("8.8.8.8", 53), ("9.9.9.9", 443)]) == []


def test_a_supernode_resolves_neither_the_control_api_nor_another_site(cluster: Cluster) -> None:
    names = ["superlink", "control", "serverapp", "supernode-b", "clientapp-b"]
    program = RESOLVE.replace("{names}", json.dumps(names))
    assert cluster.python("supernode-a", program) == ["superlink"]


def test_only_the_fleet_api_is_published(cluster: Cluster) -> None:
    published = {
        service: {port for port, hosts in ports.items() if hosts}
        for service in cluster.services
        if (ports := cluster.inspect(service)["NetworkSettings"]["Ports"])
    }
    assert {service: ports for service, ports in published.items() if ports} == {
        "superlink": {"9092/tcp"}
    }


def test_each_process_of_a_site_holds_what_it_needs_and_no_more(cluster: Cluster) -> None:
    listing = "import json, os; print(json.dumps(sorted(os.listdir('{}'))))"
    trainer = cluster.python("trainer-a", listing.format("/keys/current"))
    supernode = cluster.python("supernode-a", listing.format("/keys/current"))
    # The signed roster is public: there a trainer looks for the peers that its policy pins.
    assert trainer == ["coordinator.pub", "roster.json", "roster.sig", "signing.key"]
    assert supernode == ["ca.crt", "client.crt", "client.key", "supernode.key", "supernode.pub"]
    mounts = {
        service: {mount["Destination"] for mount in cluster.inspect(service)["Mounts"]}
        for service in ("trainer-a", "supernode-a", "clientapp-a")
    }
    assert mounts["clientapp-a"] == {"/run/trainer", "/run/clientapp"}
    assert mounts["supernode-a"] == {"/keys", "/policy", "/state", "/run/clientapp"}
    assert mounts["trainer-a"] == {"/data", "/models", "/policy", "/keys", "/state", "/run/trainer"}


def test_data_model_policy_and_keys_cannot_be_written_by_the_trainer(cluster: Cluster) -> None:
    folders = ["/state", "/data", "/models", "/policy", "/keys", "/app", "/"]
    written = cluster.python("trainer-a", WRITE.replace("{folders}", json.dumps(folders)))
    assert written == ["/state"]


def test_no_two_sites_share_a_volume_but_the_public_model(cluster: Cluster) -> None:
    volumes = [
        {
            mount["Name"]
            for service in SITE_SERVICES
            for mount in cluster.inspect(f"{service}-{site}")["Mounts"]
        }
        for site in cluster.names
    ]
    assert volumes[0] & volumes[1] == {f"{cluster.project}_models"}


def test_every_process_runs_without_privileges(cluster: Cluster) -> None:
    for service in cluster.services:
        status = cluster.python(service, STATUS)
        assert status["Uid"] == ["10001"] * 4, service
        assert int(status["CapEff"][0], 16) == int(status["CapBnd"][0], 16) == 0, service
        assert status["NoNewPrivs"] == ["1"], service


def test_every_container_is_bounded_and_read_only(cluster: Cluster) -> None:
    for service in cluster.services:
        container = cluster.inspect(service)
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert 0 < host["Memory"] == host["MemorySwap"], service
        assert 0 < host["PidsLimit"] <= 1024, service
        assert host["Init"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert {"max-size", "max-file"} <= set(host["LogConfig"]["Config"]), service
        assert container["Config"]["StopTimeout"] >= 20, service
        assert not host["Privileged"], service
        assert not host["Devices"], service
        assert container["Config"]["Healthcheck"], service
