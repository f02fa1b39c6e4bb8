"""The run folder: configuration as run, versions, one checkpoint per round, metrics, result.

    runs/icd10-20260301-101500-1f3a/
      config.json        the whole configuration, defaults included
      versions.json      what it ran on
      status.json        running, stopped, finished or failed, with the reason
      metrics.jsonl      one line per event (metrics.py)
      rounds/0003/       adapter, residual, memory (.safetensors) and state.json, written atomically
      adapter/           the final adapter in PEFT's own format

A resumed run starts from the highest round folder; nothing else is needed of the past.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig, validate
from fedqlora.errors import CheckpointError
from fedqlora.files import replace_folder, write_durably


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all sites agreed on in round 0.

    Attributes:
        base_digest: digest of the base model.
        family: `causal` or `seq2seq`.
    """

    base_digest: str
    family: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that the next round needs.

    Attributes:
        round: finished rounds; 0 is the untrained adapter.
        adapter: the aggregated adapter after that round.
        residual: what the sites load frozen beside it; empty if the method keeps none.
        memory: what the next round's aggregation needs beside both, such as moments.
        origin: what the sites agreed on.
        issued: highest issue number used so far.
    """

    round: int
    adapter: Adapter
    residual: Adapter
    memory: Adapter = field(default_factory=dict)
    origin: Origin
    issued: int


class RunFolder:
    """An existing run folder.

    Args:
        path: the folder.

    Raises:
        CheckpointError: it is not a run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a run folder; name one under runs/")

    @classmethod
    def create(cls, runs: Path, config: RunConfig) -> RunFolder:
        """Make a new folder for a run, named after the run and the time.

        Raises:
            CheckpointError: it cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = runs / f"{config.name}-{stamp}-{secrets.token_hex(2)}"
        try:
            (path / "rounds").mkdir(parents=True)
            write_durably(path / "config.json", config.model_dump_json(indent=2).encode() + b"\n")
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise _unwritable(path, error) from None
        return cls(path)

    @property
    def name(self) -> str:
        """The run's name in every envelope: no two folders share it."""
        return self.path.name

    @contextmanager
    def claim(self, wait_seconds: float) -> Iterator[None]:
        """Keeps other processes from working on this run meanwhile; a dead one's claim is void.

        A ServerApp that was stopped or cut off may live for some seconds; two of them on one run
        would send sites two instructions for one round.

        Args:
            wait_seconds: how long another process may still take to end.

        Raises:
            CheckpointError: another process still works on it, or the folder cannot be written.
        """
        deadline = time.monotonic() + wait_seconds
        try:
            file = (self.path / ".claim").open("ab")
        except OSError as error:
            raise _unwritable(self.path, error) from None
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise CheckpointError(
                            f"another process still works on run {self.name}; stop that run, or "
                            "wait until it ends"
                        ) from None
                time.sleep(0.1)
            yield

    def config(self) -> RunConfig:
        """The configuration as run.

        Raises:
            CheckpointError: the file does not parse.
            ConfigError: it was written by a release with other keys.
        """
        return validate(RunConfig, self.read_json("config.json"), str(self.path / "config.json"))

    def set_status(self, status: str, **facts: str | int) -> None:
        """Write status.json: running, stopped, finished or failed."""
        self.write_json("status.json", {"status": status, **facts})

    def status(self) -> dict[str, Any]:
        """The newest status; `new` before the run's first start."""
        if not (self.path / "status.json").is_file():
            return {"status": "new"}
        return self.read_json("status.json")

    @property
    def is_finished(self) -> bool:
        """Whether its last round and all that follows it are done."""
        return bool(self.status()["status"] == "finished")

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file of the run folder atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            write_durably(self.path / name, json.dumps(content, indent=2).encode() + b"\n")
        except OSError as error:
            raise _unwritable(self.path / name, error) from None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a round's checkpoint: afterwards either all of it is there or nothing.

        Raises:
            CheckpointError: it cannot be written (out of disk, say); earlier rounds stay.
        """
        final = self._round(checkpoint.round)
        state = {
            "round": checkpoint.round,
            "issued": checkpoint.issued,
            "origin": asdict(checkpoint.origin),
        }
        try:
            replace_folder(
                final,
                {
                    "adapter.safetensors": safetensors.numpy.save(checkpoint.adapter),
                    "residual.safetensors": safetensors.numpy.save(checkpoint.residual),
                    "memory.safetensors": safetensors.numpy.save(checkpoint.memory),
                    "state.json": json.dumps(state, indent=2).encode() + b"\n",
                },
            )
        except OSError as error:
            raise _unwritable(final, error) from None

    def latest(self) -> Checkpoint | None:
        """The checkpoint of the highest finished round; None before round 0.

        Raises:
            CheckpointError: that checkpoint cannot be read.
        """
        finished = sorted((self.path / "rounds").glob("[0-9][0-9][0-9][0-9]"))
        return _read(finished[-1]) if finished else None

    def start(self) -> Checkpoint:
        """The checkpoint before the first round.

        Raises:
            CheckpointError: it cannot be read.
        """
        return _read(self._round(0))

    def _round(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:04d}"

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path / name} cannot be read; restore it from a backup")
        return content


def _read(path: Path) -> Checkpoint:
    """One round's checkpoint."""
    try:
        adapter = safetensors.numpy.load_file(path / "adapter.safetensors")
        residual = safetensors.numpy.load_file(path / "residual.safetensors")
        memory = safetensors.numpy.load_file(path / "memory.safetensors")
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(
            round=state["round"],
            adapter=adapter,
            residual=residual,
            memory=memory,
            origin=Origin(**state["origin"]),
            issued=state["issued"],
        )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        raise CheckpointError(
            f"{path} is damaged; remove that folder to resume from the round before"
        ) from None


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error.strerror}); free space or correct its owner, "
        f"then `make resume RUN=...` continues"
    )
