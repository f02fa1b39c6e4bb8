"""The development cluster's rendered file: it is the committed one, and no two sites share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest

from deploy.cluster import ROOT, RenderError, read_command, render_cluster, trainer_command
from deploy.overlay import choose_devices, render_overlay
from deploy.render import main

SITES = (1, 2, 5)
SHARED = {"models"}  # public weights, read-only


def read_services(text: str) -> dict[str, str]:
    """Each service's block of a rendered file."""
    body = text.split("\nservices:\n", 1)[1].split("\nnetworks:\n", 1)[0]
    parts = re.split(r"^  ([a-z-]+):\n", body, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def read_list(block: str, key: str) -> set[str]:
    """What stands under a key of a service: names of volumes or networks."""
    found = re.search(rf"^    {key}: !override\n((?:      .*\n)+)", block, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    return {re.split(r"[:{]", line.strip().removeprefix("- "))[0] for line in lines}


def pairs(text: str, key: str) -> Iterator[tuple[set[str], set[str]]]:
    """For every two sites, what their three services have under a key."""
    services = read_services(text)
    names = [name[-1] for name in services if name.startswith("trainer-")]
    of = {
        site: set().union(
            *(read_list(services[f"{role}-{site}"], key) for role in ("trainer", "supernode"))
        )
        | read_list(services[f"clientapp-{site}"], key)
        for site in names
    }
    return ((of[a], of[b]) for a, b in itertools.combinations(names, 2))


def test_the_committed_files_are_what_the_renderer_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--sites", "3"]) == 0
    assert capsys.readouterr().out == (ROOT / "docker-compose.yml").read_text()
    assert main(["--sites", "3", "--gpus", ""]) == 0
    assert (
        capsys.readouterr().out.replace("--gpus 0,1,2,3", "--gpus 0,1,2,3")
        == (ROOT / "docker" / "compose.gpu.yml").read_text()
    )


@pytest.mark.parametrize("sites", SITES)
def test_each_site_has_its_own_trainer_supernode_and_clientapp(sites: int) -> None:
    services = read_services(render_cluster(sites))
    centre = {"bootstrap", "superlink", "enrol", "serverapp", "evaluator", "admin"} | {
        "certs",
        "model",
    }
    assert set(services) - centre == {
        f"{role}-{site}"
        for role in ("trainer", "supernode", "clientapp")
        for site in "abcde"[:sites]
    }
    assert centre <= set(services)


@pytest.mark.parametrize("sites", SITES)
def test_in_the_text_no_two_sites_share_a_volume_or_a_network(sites: int) -> None:
    text = render_cluster(sites)
    for one, other in pairs(text, "volumes"):
        assert len(one) == 9  # eight of its own, and the model
        assert one & other == SHARED
    for one, other in pairs(text, "networks"):
        assert len(one) == 2
        assert not one & other


def test_the_check_for_shared_volumes_finds_one() -> None:
    """A file in which b reads the data of a is what the tests above are for."""
    text = render_cluster(2).replace("b-data:/data:ro", "a-data:/data:ro")
    ((one, other),) = pairs(text, "volumes")
    assert one & other == SHARED | {"a-data"}


def test_every_volume_and_network_that_is_used_is_declared() -> None:
    text = render_cluster(5)
    networks, volumes = text.split("\nnetworks:\n", 1)[1].split("\nvolumes:\n", 1)
    for key, declared in (("networks", networks), ("volumes", volumes)):
        used = set().union(*(read_list(block, key) for block in read_services(text).values()))
        known = set(re.findall(r"^  ([a-z-]+):", declared, re.MULTILINE))
        assert used - {"./experiments"} <= known
        assert used - {"./experiments"}


def test_a_sites_command_is_the_hospitals_own_but_for_its_name() -> None:
    template = read_command("site", "client.trainer")
    assert trainer_command("b") == template.replace('"${FEDQLORA_SITE:-site}"', "b") != template
    assert trainer_command("b") in read_services(render_cluster(2))["trainer-b"]


def test_many_sites_get_addresses_that_do_not_overlap() -> None:
    subnets = re.findall(r"subnet: (\S+)/28", render_cluster(26))
    assert len(set(subnets)) == len(subnets) == 2 * 26 + 2
    assert "subnet" not in render_cluster(5)


def test_by_default_each_site_and_the_evaluator_get_a_device_of_their_own() -> None:
    for sites in SITES:
        text = render_overlay(sites, choose_devices(sites, ""), shared=False)
        devices = re.findall(r'device_ids: \["(.*?)"\]', text)
        assert devices == [str(number) for number in range(sites + 1)]
        assert "--memory-fraction" not in text


def test_a_shared_device_is_parted_so_that_all_of_them_fit() -> None:
    text = render_overlay(2, ["MIG-1f2e"], shared=True)
    assert re.findall(r'device_ids: \["(.*?)"\]', text) == ["MIG-1f2e"] * 3
    shares = [float(share) for share in re.findall(r"--memory-fraction, '(.*?)'", text)]
    assert shares == [0.3, 0.3, 0.3]
    assert sum(float(s) for s in re.findall(r"n, '(.*?)'", render_overlay(6, ["0"], True))) <= 0.9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sites", "0"], "SITES=0 cannot be: take a number from 1 to 26."),
        (["--sites", "27"], "SITES=27 cannot be: take a number from 1 to 26."),
        (["--sites", "2", "--gpus", "0,0,1"], "GPU 0 is there twice: .* SHARED_GPU"),
        (["--sites", "2", "--gpus", "0,1"], "2 sites and the evaluator need 3 GPUs, not 2: "),
        (["--sites", "2", "--gpus", "0,1,x"], "x is no GPU: "),
        (["--sites", "2", "--gpus", "0,,1"], "An empty text is no GPU: "),
        (["--sites", "2", "--gpus", "00,0,1"], "00 is no GPU: "),
        (["--sites", "2", "--shared-gpu", "0,1"], "SHARED_GPU takes one device: "),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(sentence, printed.err)
    assert printed.err.count("\n") == 1


def test_a_template_without_the_command_is_not_rendered_around() -> None:
    with pytest.raises(RenderError, match=r"deploy/site/compose\.yml has no one-line command"):
        read_command("site", "server.evaluator")


def test_the_clientapps_api_listens_on_a_name_that_means_their_network_alone() -> None:
    """A service's own name means every network that it is in, and one of a site's leads out."""
    template = (ROOT / "deploy" / "site" / "compose.yml").read_text()
    found = re.search(r'--clientapp-api, "(.*?):9094"', template)
    assert found
    name = found[1]
    assert f'--runtime-api, "{name}:9094"' in template
    assert f"clientapp: {{aliases: [{name}]}}" in template
    assert f"clientapp-a: {{aliases: [{name}]}}" in render_cluster(1)
    services = re.findall(r"^  ([a-z-]+):$", template, re.MULTILINE)
    assert "supernode" in services
    assert name not in services
