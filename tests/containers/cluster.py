"""The development cluster as tests see it: brought up with `make`, looked into with `docker`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

LONG_RUNNING = ("superlink", "serverapp", "evaluator")
SITE_SERVICES = ("trainer", "supernode", "clientapp")


class Cluster:
    """A cluster of its own project, so that nobody's own one is touched.

    Args:
        sites: number of sites.
        project: compose project name.
        port: published port of the Fleet API.
    """

    def __init__(self, sites: int, project: str, port: int) -> None:
        self.names = "abcdefghijklmnopqrstuvwxyz"[:sites]
        self.project = project
        self._settings = {"SITES": str(sites), "PROJECT": project, "FLEET_PORT": str(port)}

    @property
    def services(self) -> list[str]:
        """Services that run all the time."""
        return [*LONG_RUNNING, *(f"{one}-{site}" for one in SITE_SERVICES for site in self.names)]

    def make(self, target: str, *arguments: str, seconds: int = 900) -> str:
        """Runs a target of the Makefile and returns what it printed."""
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        done = subprocess.run(
            ["make", "--no-print-directory", target, *settings, *arguments],
            cwd=ROOT,
            env={**os.environ, "MAKEFLAGS": ""},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"make {target}:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
        return done.stdout

    def start_run(self, settings: Mapping[str, object]) -> subprocess.Popen[str]:
        """`make run` of the demo's experiment with these settings, in the background."""
        written = " ".join(f"{key}={value}" for key, value in settings.items())
        command = ["make", "--no-print-directory", "run", f"PROJECT={self.project}"]
        return subprocess.Popen(
            [*command, "EXPERIMENT=icd10", f"SET={written}"],
            cwd=ROOT,
            env={**os.environ, "MAKEFLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_round(self, run: subprocess.Popen[str], site: str, round_: int, said: str) -> None:
        """Waits until a site trains a round of a run that is still going.

        Args:
            run: what `start_run` gave.
            site: the site.
            round_: the round.
            said: what the site's trainer had logged before the run.
        """

        def trains() -> bool:
            assert run.poll() is None, run.communicate()[0]
            return f"round {round_} of run" in self.logs(f"trainer-{site}")[len(said) :]

        wait_for(trains, 300, f"trainer {site} begins round {round_}")

    def container(self, service: str) -> str:
        """Name of a service's container."""
        return f"{self.project}-{service}-1"

    def docker(self, *arguments: str, check: bool = True, seconds: int = 120) -> str:
        """Runs a docker command; returns what it printed."""
        done = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, f"docker {arguments}: {done.stderr[-3000:]}"
        return done.stdout + ("" if check else done.stderr)

    def python(self, service: str, program: str) -> Any:
        """Runs a Python program inside a service's container; returns the JSON it prints."""
        name = self.container(service)
        return json.loads(self.docker("exec", name, "python", "-S", "-c", program))

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        found: dict[str, Any] = json.loads(self.docker("inspect", self.container(service)))[0]
        return found

    def addresses(self, service: str) -> dict[str, str]:
        """Addresses of a service by network, without the project's prefix."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return {
            name.removeprefix(f"{self.project}_"): network["IPAddress"]
            for name, network in networks.items()
        }

    def logs(self, service: str) -> str:
        """What a service has said so far."""
        return self.docker("logs", self.container(service), check=False)

    def healthy(self, service: str) -> bool:
        """Whether the engine calls a service healthy."""
        return str(self.inspect(service)["State"]["Health"]["Status"]) == "healthy"

    def stop_admin(self) -> None:
        """Ends whoever follows a run, as closing the terminal would."""
        labels = ("oneoff=True", "service=admin", f"project={self.project}")
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        for container in self.docker("ps", "--quiet", *filters).split():
            self.docker("stop", container)

    def kill(self, service: str) -> None:
        """Ends a service's program with SIGKILL as a crash would, so that it is started again."""
        # `docker kill` counts as a person's wish, after which the engine does not restart.
        program = (
            "import os, json\n"
            "own = os.getpid()\n"
            "for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):\n"
            "    if pid not in (1, own):\n"
            "        os.kill(pid, 9)\n"
            "print(json.dumps('done'))"
        )
        self.python(service, program)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for a condition; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def read_run_name(output: str) -> str:
    """The run that `make run` has saved."""
    found = re.search(r"^run: (\S+)$", output, re.MULTILINE)
    assert found, f"no run was named:\n{output[-3000:]}"
    return found[1]
