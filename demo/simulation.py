"""Simulation: a federation's ServerApp and trainers on Flower's simulation engine, no network.

Only the transport differs from a deployed federation: instead of SuperLink, SuperNode and socket,
Flower's simulation engine (Ray) hands the same signed envelopes to the same trainer code. So the
same seed gives the same adapter, to the bit. One base model per worker serves all its sites;
what a site keeps between rounds (replay window, audit log) is on disk, and so any worker can
take any site.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from client.app import reply_with, unwrap
from demo.devices import Device
from demo.earlier import SITES
from demo.hospitals import Hospitals
from demo.policy import render_policy
from fedqlora.errors import FederationError, FedqloraError
from fedqlora.files import write_durably
from server.app import main as run_rounds
from server.checkpoint import RunFolder
from server.evaluation import NAME

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it Ray warns that a later Ray will do so: a worker without a GPU keeps its variables.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Each worker has one core, as each trainer of a demo with more sites than cores.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True, kw_only=True)
class SimulatedSite:
    """One hospital of a simulation."""

    name: str
    """Its name in roster and envelopes."""
    data: Path
    """Its records."""
    policy: Path
    """Its `policy.toml`."""
    keys: Path
    """Folder with `signing.key` and `coordinator.pub`."""
    state: Path
    """Keeps its replay window and audit log."""
    unreliability: float = 0.0
    """Share of rounds in which it does not answer, drawn from the run, the site and the round."""


def lay_out(
    folder: RunFolder, hospitals: Hospitals, kinds: Sequence[Device]
) -> list[SimulatedSite]:
    """The demo's hospitals with these machines; writes a policy for each beside its state."""
    config = folder.config()
    sites = []
    for name, kind in zip(hospitals.names, kinds, strict=True):
        state = hospitals.state(folder.path.parent, name)
        state.mkdir(parents=True, exist_ok=True)
        text = render_policy(
            hospitals.digest(),
            steps=max(1, round(config.training.steps * kind.steps)),
            rank=max(1, round(config.lora.rank * kind.rank)),
            peers=hospitals.peers(),
            key_sites=hospitals.key_sites,
        )
        write_durably(state / "policy.toml", text.encode())
        sites.append(
            SimulatedSite(
                name=name,
                data=hospitals.records(name),
                policy=state / "policy.toml",
                keys=hospitals.certs / "sites" / name / "current",
                state=state,
                unreliability=kind.unreliability,
            )
        )
    return sites


def simulate(
    folder: RunFolder,
    sites: Sequence[SimulatedSite],
    *,
    models: Path,
    certs: Path,
    held_out: Path | None,
    workers: int,
) -> None:
    """Run or resume a run folder in one process tree.

    Args:
        folder: the run; its status says afterwards how it ended.
        sites: the hospitals.
        models: folder of base models.
        certs: what `python -m certs make --out` made for these sites.
        held_out: the evaluator's held-out set; None where the run asks for no scores.
        workers: processes that train at the same time, a core each.

    Raises:
        FedqloraError: the run cannot go on, as in a deployed federation.
    """
    # Flower and Ray read the environment when they are imported or start their processes.
    os.environ.update(_ENVIRONMENT)
    from flwr.simulation import run_simulation

    # Flower asks to see every deprecation; those inside torch are not for who runs this.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # The ServerApp says what happens, and each site's audit log; Flower would print tracebacks.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    logging.getLogger("server").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="fq-") as scratch:
        socket = Path(scratch) / "evaluator.sock"
        os.environ["FEDQLORA_RUNS"] = str(folder.path.parent.resolve())
        os.environ["FEDQLORA_COORDINATOR"] = str(certs.resolve() / "coordinator")
        os.environ["FEDQLORA_EVALUATOR_SOCKET"] = str(socket)
        _start_ray(workers)
        with _evaluating(folder, socket, certs / "evaluator", models, held_out):
            run_simulation(
                server_app=_make_server_app(folder.name),
                client_app=_make_client_app(list(sites), models.resolve()),
                num_supernodes=len(sites),
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )


def _start_ray(workers: int) -> None:
    """Start Ray, once more where a first start off a cold disk outlasts the 30 s that Ray waits."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for last in (False, True):
        try:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
            return
        except Exception as error:
            ray.shutdown()
            if last:
                raise FederationError(
                    f"Ray does not start ({str(error)[:200]}): free memory and processors, then "
                    "resume the run"
                ) from error


@contextmanager
def _evaluating(
    folder: RunFolder, socket: Path, keys: Path, models: Path, held_out: Path | None
) -> Iterator[None]:
    """The evaluator on its socket, in a thread of this process."""
    if held_out is None:
        yield
        return
    # Only here, as they bring in torch.
    from fedqlora.engine.service import Identity, Service, listen
    from fedqlora.engine.warm import WarmModel
    from server.evaluator import Scorer

    identity = Identity.load(NAME, keys)
    state = folder.path.parent / SITES / NAME
    server = listen(
        Service(identity, state, Scorer(held_out, models, WarmModel()), (FedqloraError,)), socket
    )
    try:
        yield
    finally:
        server.stop(grace=0).wait()


def _make_server_app(run: str) -> ServerApp:
    """The ServerApp of every federation, told which run it is."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config["run"] = run
        run_rounds(grid, context)

    return app


def _make_client_app(sites: Sequence[SimulatedSite], models: Path) -> ClientApp:
    """A ClientApp that is each site's trainer; it travels to Ray's workers."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        # Only in Ray's workers, as it brings in torch.
        from demo.simulated_site import answer

        site = sites[int(context.node_config["partition-id"])]
        try:
            reply = answer(site, models, unwrap(message))
        except RuntimeError as error:
            # An exception would bring Ray's own report of it along.
            failed = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
            return Message(failed, reply_to=message)
        return reply_with(message, reply)

    return app
