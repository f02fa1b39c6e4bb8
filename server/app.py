"""The ServerApp: opens the run folder that the submission names and runs it to its end.

The SuperExec that starts this process provides, in its environment:

    FEDQLORA_RUNS              folder of run folders and of the centre's audit log
    FEDQLORA_COORDINATOR       folder with signing.key and the signed roster
    FEDQLORA_EVALUATOR_SOCKET  socket of the evaluator, where the run wants scores
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from certs.roster import Roster
from fedqlora import VERSION
from fedqlora.config import RunConfig
from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.keys import public_key
from server.centre_log import CentreLog
from server.checkpoint import Checkpoint, RunFolder
from server.evaluation import Evaluator
from server.exchange import Exchange
from server.report import refresh_report
from server.roster import load_roster
from server.rounds import federate

log = logging.getLogger("server")
app = ServerApp()

CLAIM_SECONDS = 90.0
"""A ServerApp that was stopped notices at its next heartbeat, at the latest."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the run folder named by the run-config key `run`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = RunFolder(Path(_environment("FEDQLORA_RUNS")) / str(context.run_config["run"]))
    with folder.claim(CLAIM_SECONDS):
        try:
            _run(folder, grid)
        except FedqloraError as error:
            folder.set_status("failed", error=str(error))
            refresh_report(folder)
            log.error("run %s failed: %s", folder.name, error)
            raise
        except Exception as error:
            reason = f"internal error: {type(error).__name__}; see the log"
            folder.set_status("failed", error=reason)
            refresh_report(folder)
            raise


def _run(folder: RunFolder, grid: Grid) -> None:
    folder.set_status("running", round=0)
    folder.write_json("versions.json", _versions())
    key, roster = load_roster(Path(_environment("FEDQLORA_COORDINATOR")))
    history = CentreLog(folder.path.parent, key)
    with history.run(folder.name, folder.config()):
        checkpoint = _federate(folder, grid, key, roster, history)
    folder.set_status("finished", round=checkpoint.round)


def _federate(
    folder: RunFolder, grid: Grid, key: Ed25519PrivateKey, roster: Roster, history: CentreLog
) -> Checkpoint:
    newest = folder.latest()
    exchange = Exchange(
        grid,
        key,
        {name: public_key(keys.signing) for name, keys in roster.sites.items()},
        folder.name,
        newest.issued if newest else 0,
        history,
        # A simulation packs no app: its hash is empty.
        grid.run.fab_hash,
    )
    evaluator = _evaluator(folder.config(), roster, exchange)
    return federate(folder, exchange, len(roster.sites), evaluator)


def _versions() -> dict[str, str]:
    """What the centre runs on; each site's own versions are in its `joined` event."""
    packages = ("cryptography", "flwr", "grpcio", "numpy", "protobuf", "pydantic", "safetensors")
    return {
        "fedqlora": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _evaluator(config: RunConfig, roster: Roster, exchange: Exchange) -> Evaluator | None:
    if not config.evaluation.enabled:
        return None
    socket = Path(_environment("FEDQLORA_EVALUATOR_SOCKET"))
    return Evaluator(socket, public_key(roster.evaluator), exchange.sign)


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"environment variable {name} is not set; start SuperExec with it")
    return value
