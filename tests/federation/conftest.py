"""One federation of real processes over TLS that the tests of this folder share."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest

from certs.roster import ROSTER_FILE, SIGNATURE_FILE
from certs.site import make_all
from client.peers import name_key
from demo.commands import LocalSite
from demo.processes import LocalFederation, RunResult
from fedqlora import protocol_pb2_grpc
from fedqlora.audit import AuditLog
from fedqlora.config import RunConfig, validate
from fedqlora.engine.base import base_digest
from fedqlora.engine.service import Identity, Service, Worker
from fedqlora.keys import load_signing_key
from server.checkpoint import RunFolder
from server.metrics import Metrics
from tests.tiny_models import save_llama

ROOT = Path(__file__).parents[2]
SITES = ("a", "b")


@dataclass
class Hospitals:
    """The shared federation and what tests do with it."""

    federation: LocalFederation
    runs: Path
    certs: Path
    scratch: Path

    def new_run(
        self,
        *,
        rounds: int = 2,
        steps: int = 2,
        method: str = "exact_svd",
        update: str = "bfloat16",
        sections: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
        **federation: object,
    ) -> RunFolder:
        """A run folder for the tiny model; nothing is started."""
        config: dict[str, Any] = {
            "name": "tiny",
            "model": {"base": "tiny-llama", "compute_dtype": "float32"},
            "lora": {"rank": 4},
            "training": {"steps": steps, "batch_examples": 4, "max_length": 64},
            "data": {"validation_examples": 4},
            "federation": {"rounds": rounds, "wait_seconds": 60, **federation},
            "evaluation": {"enabled": True},
            "aggregation": {"method": method},
            "codec": {"update": update},
        }
        for name, more in sections.items():
            config[name] = {**config.get(name, {}), **more}
        return RunFolder.create(self.runs, validate(RunConfig, config, "test"))

    def run(self, folder: RunFolder) -> RunResult:
        return self.federation.run(ROOT, {"run": folder.name}, timeout_seconds=240)

    def start(self, folder: RunFolder) -> int:
        return self.federation.start_run(ROOT, {"run": folder.name})

    def wait(self, run_id: int) -> RunResult:
        return self.federation.wait_for_run(run_id, timeout_seconds=240)

    def outcomes(self, folder: RunFolder, round_: int) -> dict[str, str]:
        return {line["site"]: line["outcome"] for line in self.sites(folder, round_)}

    def sites(self, folder: RunFolder, round_: int) -> list[dict[str, Any]]:
        lines = Metrics(folder.path / "metrics.jsonl").read()
        return [line for line in lines if line["event"] == "site" and line["round"] == round_]

    def wait_until_training(self, folder: RunFolder, round_: int, site: str) -> None:
        """Return once a site's real trainer is inside the optimizer steps of a round."""
        line = f"round {round_} of run {folder.name}: training"
        deadline = time.monotonic() + 120
        while line not in self.federation.read_log(f"trainer-{site}"):
            assert time.monotonic() < deadline, f"{site} never began round {round_}"
            time.sleep(0.05)

    @contextmanager
    def impostor(self, site: str, worker: Worker) -> Iterator[Callable[[Wiretap], None]]:
        """Replace a site's trainer by one that holds the site's real key and is not honest."""
        self.federation.stop_process(f"trainer-{site}")
        identity = Identity.load(site, self.certs / "sites" / site / "current")
        state = self.scratch / f"impostor-{time.monotonic_ns()}"
        # It has the site's disk too, and goes on with its audit log.
        log = self.scratch / "processes" / f"trainer-{site}" / "audit.jsonl"
        audit = AuditLog(log, identity.key)
        wire = _Wire(Service(identity, state, worker, audit=audit))
        server = grpc.server(
            ThreadPoolExecutor(max_workers=2), options=[("grpc.max_receive_message_length", -1)]
        )
        protocol_pb2_grpc.add_TrainerServicer_to_server(wire, server)
        socket = self.federation.socket_of(f"trainer-{site}")
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield wire.tap
        finally:
            server.stop(grace=0).wait()
            self.federation.start_process(f"trainer-{site}")


Wiretap = Callable[[bytes, Callable[[bytes], bytes]], bytes]


class _Wire(protocol_pb2_grpc.TrainerServicer):
    """A trainer's socket with somebody on the line, who sees requests and makes replies."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tap: Wiretap = lambda sent, honest: honest(sent)

    def tap(self, tap: Wiretap) -> None:
        self._tap = tap

    def Exchange(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        reply = self._tap(request.SerializeToString(), self._service.exchange)
        return type(request).FromString(reply)


def write_records(path: Path, site: str) -> None:
    """Forty records whose completions a tiny model can learn; two of each patient."""
    path.mkdir(parents=True)
    shift = SITES.index(site) if site in SITES else 0
    rows = [
        {
            "prompt": f"w{i % 20} w{(i * 3) % 20}",
            "completion": f"w{(i % 20) + 20 + shift}",
            "patient_id": f"{site}{i // 2}",
        }
        for i in range(40)
    ]
    (path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_policy(path: Path, digest: str, rank: int = 8, rest: str = "") -> None:
    path.write_text(
        f'[models]\ndigests = ["{digest}"]\n'
        f"[limits]\nrank = {rank}\nsteps = 5000\nrounds = 9\n{rest}"
    )


def pin_peers(certs: Path, sites: Sequence[str]) -> str:
    """Give each site the signed roster; what their policies then say of each other."""
    for name in (ROSTER_FILE, SIGNATURE_FILE):
        for site in sites:
            shutil.copy(certs / "coordinator" / name, certs / "sites" / site / "current" / name)
    keys = {
        site: load_signing_key(certs / "sites" / site / "current" / "signing.key") for site in sites
    }
    pins = [f'{site} = "{name_key(key.public_key())}"' for site, key in keys.items()]
    return "\n".join(["[secure_aggregation]", "required = true", "[peers]", *pins, ""])


# Of the package, so that it does not go on, idle, beside all other tests.
@pytest.fixture(scope="package")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    with running_hospitals(tmp_path_factory.mktemp("federation")) as running:
        yield running


@contextmanager
def running_hospitals(
    folder: Path, sites: Sequence[str] = SITES, *, masked: bool = False
) -> Iterator[Hospitals]:
    """Hospitals and an evaluator of a tiny model, with all that they need in `folder`.

    Args:
        folder: new.
        sites: their names.
        masked: whether their policies pin each other and require secure aggregation.
    """
    digest = base_digest(save_llama(folder / "models" / "tiny-llama"))
    make_all(folder / "certs", list(sites))
    rest = pin_peers(folder / "certs", sites) if masked else ""
    for site in sites:
        write_records(folder / "data" / site, site)
        write_policy(folder / f"{site}.toml", digest, rest=rest)
    write_records(folder / "held-out", "held-out")
    with LocalFederation(
        certs=folder / "certs",
        folder=folder / "processes",
        runs=folder / "runs",
        sites=[
            LocalSite(name=site, data=folder / "data" / site, policy=folder / f"{site}.toml")
            for site in sites
        ],
        models=folder / "models",
        held_out=folder / "held-out",
        # A trainer that is gone for good is not waited for: these tests end it on purpose.
        environment={"FEDQLORA_TRAINER_WAIT_SECONDS": "30", "OMP_NUM_THREADS": "1"},
    ) as federation:
        yield Hospitals(federation, folder / "runs", folder / "certs", folder)
