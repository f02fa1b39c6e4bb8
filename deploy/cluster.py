"""The development cluster's compose file, for any number of sites, from the operators' templates.

Each service extends its template in deploy/site or deploy/server; what is written here is only
which volumes, networks and images it gets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROOT = Path(__file__).resolve().parent.parent

POOLED_SITES = 10
"""Docker's own address pools hold about 30 networks; more sites need addresses given here."""


class RenderError(Exception):
    """A number of sites or a device that cannot be; the message is one sentence."""


HEAD = """\
# {what}
# Printed by `python3 -m deploy.render {arguments}`: change deploy/, then print it anew.
"""

CLUSTER = """\
name: fedqlora

x-build: &build
  context: .
  args: &arguments
    DEVICE: ${DEVICE:-cpu}
    BASE_IMAGE: ${BASE_IMAGE:-debian:bookworm-slim}
    PIP_INDEX_URL: ${PIP_INDEX_URL:-}
    TORCH_INDEX_URL: ${TORCH_INDEX_URL:-}
    OFFLINE: ${OFFLINE:-}
    EXTRAS: ${EXTRAS:-}
    REVISION: ${REVISION:-unknown}
  secrets: [ca_bundle]

x-closed: &closed # no way out, and no address of the host in it
  internal: true
  driver_opts: {com.docker.network.bridge.inhibit_ipv4: "true"}

x-memory: &memory
  driver_opts: {type: tmpfs, device: tmpfs, o: "uid=10001,gid=10001,mode=0770,size=1m"}

x-after-bootstrap: &after-bootstrap
  bootstrap: {condition: service_completed_successfully}

secrets:
  # A company's certificate authority for package downloads during a build; empty is none.
  ca_bundle: {file: "${CA_BUNDLE:-/dev/null}"}
"""

DEALT_KEYS = """\
      - certs:/deal/certs
      - superlink-keys:/deal/superlink
      - coordinator-keys:/deal/coordinator
      - evaluator-keys:/deal/evaluator
      - root-certificate:/deal/root"""
"""Every party's keys, as the two services that deal them have them."""

CENTRE = """\
services:
  # Development only: certificates, model and data where they are missing, dealt to each party.
  bootstrap:
    extends: {{file: deploy/server/compose.yml, service: evaluator}}
    image: fedqlora-demo:${{DEVICE:-cpu}}
    pull_policy: never
    build: {{<<: *build, dockerfile: docker/server.Dockerfile, target: demo}}
    restart: "no"
    healthcheck: !reset {{}}
    command: [demo.bootstrap, --sites, "{names}"]
    volumes: !override
{dealt}
      - held-out:/deal/held-out
      - models:/deal/models
{deals}
  superlink:
    extends: {{file: deploy/server/compose.yml, service: superlink}}
    pull_policy: never
    build: {{<<: *build, dockerfile: docker/server.Dockerfile, target: server}}
    networks: !override
      published: {{priority: 1000}}
      control: {{aliases: [control]}}
      monitoring: {{aliases: [superlink-metrics]}}
{fleets}
    volumes: !override
      - superlink-keys:/certs/superlink:ro
      - superlink-state:/state
      - superexec-secret:/run/superexec
    depends_on: !override {{<<: *after-bootstrap}}

  enrol:
    extends: {{file: deploy/server/compose.yml, service: enrol}}
    pull_policy: never
    volumes: !override
      - coordinator-keys:/certs/coordinator:ro
      - root-certificate:/certs/root:ro

  serverapp:
    extends: {{file: deploy/server/compose.yml, service: serverapp}}
    pull_policy: never
    volumes: !override
      - coordinator-keys:/certs/coordinator:ro
      - root-certificate:/certs/root:ro
      - runs:/runs
      - evaluator-socket:/run/evaluator:ro
      - superexec-secret:/run/superexec:ro

  evaluator:
    extends: {{file: deploy/server/compose.yml, service: evaluator}}
    pull_policy: never
    volumes: !override
      - held-out:/held-out:ro
      - models:/models:ro
      - evaluator-keys:/certs/evaluator:ro
      - evaluator-state:/state
      - evaluator-socket:/run/evaluator
    depends_on: !override {{<<: *after-bootstrap}}

  admin:
    extends: {{file: deploy/server/compose.yml, service: admin}}
    pull_policy: never
    volumes: !override
      - coordinator-keys:/certs/coordinator:ro
      - root-certificate:/certs/root:ro
      - models:/models:ro
      - ./experiments:/app/experiments:ro
      - runs:/runs

  # On demand, by `make rotate-certs` and its like: changes keys while all goes on.
  certs:
    extends: {{file: deploy/server/compose.yml, service: admin}}
    image: fedqlora-demo:${{DEVICE:-cpu}}
    pull_policy: never
    entrypoint: [python, -m]
    command: [demo.lifecycle, --help]
    volumes: !override
{dealt}
      - runs:/runs:ro
{keys}
  model:
    extends: {{file: deploy/site/compose.yml, service: model}}
    pull_policy: never
    volumes: !override
      - models:/models
"""

SITE = """\
  trainer-{site}:
    extends: {{file: deploy/site/compose.yml, service: trainer}}
    pull_policy: never{build}
    command: {command}
    environment: {{OMP_NUM_THREADS: "${{TRAINER_THREADS:-1}}"}}
    volumes: !override
      - {site}-data:/data:ro
      - models:/models:ro
      - {site}-policy:/policy:ro
      - {site}-trainer-keys:/keys:ro
      - {site}-trainer-state:/state
      - {site}-trainer-socket:/run/trainer
    depends_on: !override {{<<: *after-bootstrap}}

  supernode-{site}:
    extends: {{file: deploy/site/compose.yml, service: supernode}}
    pull_policy: never
    networks: !override
      fleet-{site}: {{}}
      clientapp-{site}: {{aliases: [runtime]}}
    dns: [127.0.0.1]
    dns_opt: ["timeout:1", "attempts:1"]
    volumes: !override
      - {site}-supernode-keys:/keys:ro
      - {site}-policy:/policy:ro
      - {site}-supernode-state:/state
      - {site}-clientapp-handover:/run/clientapp
    depends_on: !override
      trainer-{site}: {{condition: service_healthy}}
      enrol: {{condition: service_completed_successfully}}

  clientapp-{site}:
    extends: {{file: deploy/site/compose.yml, service: clientapp}}
    pull_policy: never
    networks: !override
      clientapp-{site}: {{}}
    volumes: !override
      - {site}-trainer-socket:/run/trainer:ro
      - {site}-clientapp-handover:/run/clientapp:ro
    depends_on: !override
      supernode-{site}: {{condition: service_started}}
"""

CENTRE_VOLUMES = """\
volumes:
  certs: {}
  superlink-keys: {}
  coordinator-keys: {}
  evaluator-keys: {}
  root-certificate: {}
  held-out: {}
  models: {}
  superlink-state: {}
  evaluator-state: {}
  runs: {}
  evaluator-socket: *memory
  superexec-secret: *memory
"""

SITE_VOLUMES = """\
  {site}-data: {{}}
  {site}-policy: {{}}
  {site}-supernode-keys: {{}}
  {site}-trainer-keys: {{}}
  {site}-trainer-state: {{}}
  {site}-supernode-state: {{}}
  {site}-trainer-socket: *memory
  {site}-clientapp-handover: *memory
"""

KEYS = """\
      - {site}-supernode-keys:/deal/sites/{site}/supernode
      - {site}-trainer-keys:/deal/sites/{site}/trainer
"""

DEAL = (
    KEYS
    + """\
      - {site}-data:/deal/sites/{site}/data
      - {site}-policy:/deal/sites/{site}/policy
      - {site}-trainer-state:/deal/sites/{site}/state
"""
)


def site_names(sites: int) -> list[str]:
    """The sites' names, one letter each.

    Raises:
        RenderError: the number is not from 1 to 26.
    """
    if not 1 <= sites <= len(LETTERS):
        raise RenderError(f"SITES={sites} cannot be: take a number from 1 to {len(LETTERS)}.")
    return list(LETTERS[:sites])


def render_cluster(sites: int) -> str:
    """The development cluster's compose file.

    Raises:
        RenderError: the number of sites cannot be.
    """
    names = site_names(sites)
    centre = CENTRE.format(
        names=",".join(names),
        dealt=DEALT_KEYS,
        deals="".join(DEAL.format(site=name) for name in names),
        keys="".join(KEYS.format(site=name) for name in names),
        fleets="\n".join(f"      fleet-{name}: {{}}" for name in names),
    )
    build = "\n    build: {<<: *build, dockerfile: docker/client.Dockerfile}"
    blocks = [
        SITE.format(site=name, command=trainer_command(name), build=build if name == "a" else "")
        for name in names
    ]
    head = HEAD.format(
        what=f"The development cluster: one aggregator and {sites} site{'s'[: sites > 1]}.",
        arguments=f"--sites {sites}",
    )
    volumes = CENTRE_VOLUMES + "".join(SITE_VOLUMES.format(site=name) for name in names)
    return "\n".join([head + CLUSTER, centre, *blocks, _networks(names), volumes])


def trainer_command(site: str) -> str:
    """The trainer's command from the site's template, for one site."""
    return read_command("site", "client.trainer").replace('"${FEDQLORA_SITE:-site}"', site)


def read_command(template: str, module: str) -> str:
    """The one-line command that starts a module in a template."""
    text = (ROOT / "deploy" / template / "compose.yml").read_text(encoding="utf-8")
    found = re.findall(rf"^    command: (\[{re.escape(module)},.*\])$", text, re.MULTILINE)
    if len(found) != 1:
        raise RenderError(f"deploy/{template}/compose.yml has no one-line command of {module}.")
    return str(found[0])


def _networks(names: Sequence[str]) -> str:
    closed = [
        "control",
        "monitoring",
        *(f"{kind}-{name}" for name in names for kind in ("fleet", "clientapp")),
    ]
    lines = ["networks:"]
    for number, name in enumerate(closed):
        # Reserved for measurements, never routed; the host has no address in these networks.
        own = f", ipam: {{config: [{{subnet: 198.18.{number}.0/28}}]}}"
        lines.append(f"  {name}: {{<<: *closed{own if len(names) > POOLED_SITES else ''}}}")
    lines += [
        "  # Only what is published comes in here; without masquerading nothing gets out.",
        "  published:",
        '    driver_opts: {com.docker.network.bridge.enable_ip_masquerade: "false"}',
        "  outbound: {} # the model download's",
    ]
    return "\n".join(lines) + "\n"
