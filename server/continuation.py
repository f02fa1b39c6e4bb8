"""Continuation: a further task on a finished run, from that run's adapter.

finished run -> checks -> configuration -> start -> new run folder, whose round 0 is the start

Sites are held to that round 0 as those of a resumed run are: one with another base model or another
adapter takes no part. Nothing of the earlier run changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqlora import VERSION
from fedqlora.adapter import AdapterSpec, rank_of
from fedqlora.config import RunConfig
from fedqlora.continual import freeze, orthogonal_start
from fedqlora.errors import CheckpointError, ConfigError, FedqloraError, UpdateError
from server.checkpoint import Checkpoint, RunFolder
from server.history import read_history
from server.tasks import FILE

Configure = Callable[[Mapping[str, Any]], RunConfig]
"""Makes the new run's configuration, with these overrides by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A new run that has not been started."""

    config: RunConfig
    """The new run, with the chain of tasks."""
    start: Checkpoint
    """Its round 0."""
    tasks: Mapping[str, Any]
    """What `tasks.json` will hold: held-out scores before any task, and after each."""

    def create(self, runs: Path) -> RunFolder:
        """Make its run folder, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        folder = RunFolder.create(runs, self.config)
        try:
            folder.write_json(FILE, self.tasks)
            folder.save(self.start)
        except FedqloraError:
            shutil.rmtree(folder.path)
            raise
        return folder

    def check_base(self, digest: str) -> None:
        """Refuse another base model than the earlier run's, where the centre knows it.

        Raises:
            ConfigError: the digests differ.
        """
        if digest != self.start.origin.base_digest:
            raise ConfigError(
                f"base model {self.config.model.base} has digest {digest[:16]} and the earlier "
                f"run's had {self.start.origin.base_digest[:16]}; restore that model's files"
            )


def continue_from(earlier: RunFolder, configure: Configure) -> Continuation:
    """What a further task on a finished run starts with; nothing is written.

    Args:
        earlier: the finished run.
        configure: makes the new run's configuration.

    Raises:
        CheckpointError: the earlier run has not finished, is of another version, or is damaged.
        ConfigError: the new run's configuration is wrong, or its adapter is another.
    """
    end = _read_end(earlier)
    before = earlier.config()
    chain = {
        "continual.starts_from": earlier.name,
        "continual.earlier": [*before.continual.earlier, before.task],
    }
    config = configure(chain)
    _check_same_adapter(before, config, earlier)
    start = make_start(config, end, str(earlier.path))
    if config.aggregation.method != "exact_svd":
        # Methods without a residual of their own leave what is there as it is.
        config = configure({**chain, "continual.frozen_rank": rank_of(start.residual)})
    return Continuation(config=config, start=start, tasks=_scores_so_far(earlier))


def _read_end(earlier: RunFolder) -> Checkpoint:
    """The last checkpoint of a run that has finished."""
    release = _release(earlier)
    if release != VERSION:
        raise CheckpointError(
            f"{earlier.path} is of version {release} and this is {VERSION}; continue it with that "
            "version, or start a new run"
        )
    end = earlier.latest()
    if not earlier.is_finished or end is None:
        raise CheckpointError(
            f"{earlier.path} has not finished (it is {earlier.status()['status']}); finish it by "
            "`make resume RUN=...`, then continue it"
        )
    return end


def _release(earlier: RunFolder) -> str:
    if not (earlier.path / "versions.json").is_file():
        return VERSION  # never started: said better by its status
    return str(earlier.read_json("versions.json").get("fedqlora", "unknown"))


def _check_same_adapter(before: RunConfig, config: RunConfig, earlier: RunFolder) -> None:
    """Refuse settings under which the earlier adapter would be another function, or none."""
    for key, old, new in (
        ("model.base", before.model.base, config.model.base),
        ("model.quantization", before.model.quantization, config.model.quantization),
        ("lora.rank", before.lora.rank, config.lora.rank),
        ("lora.alpha or lora.rslora, so the scale,", before.lora.scale, config.lora.scale),
        ("lora.targets", before.lora.targets, config.lora.targets),
        ("lora.dora", before.lora.dora, config.lora.dora),
    ):
        if old != new:
            raise ConfigError(
                f"{key} is {_say(new)} and was {_say(old)} in {earlier.path}, whose adapter it "
                "would not fit; set it to that"
            )


def _say(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_start(config: RunConfig, end: Checkpoint, earlier: str) -> Checkpoint:
    """Round 0 of a further task: the same function as the end of the task before.

    Args:
        config: the new run.
        end: the earlier run's last checkpoint.
        earlier: names the earlier run in messages.

    Raises:
        ConfigError: the adapter has no room for another task, or its residual is too large.
    """
    adapter, residual = end.adapter, end.residual
    if config.continual.orthogonal:
        residual = freeze(adapter, residual, config.lora.scale)
        try:
            adapter = orthogonal_start(AdapterSpec.of(adapter), config.seed, residual)
        except UpdateError as error:
            raise ConfigError(str(error)) from None
    elif config.aggregation.method == "exact_svd" and rank_of(residual) > config.residual_rank:
        raise ConfigError(
            f"the residual of {earlier} has rank {rank_of(residual)} and the new run keeps "
            f"{config.residual_rank}; raise aggregation.residual_rank"
        )
    return Checkpoint(round=0, adapter=adapter, residual=residual, origin=end.origin, issued=0)


def _scores_so_far(earlier: RunFolder) -> dict[str, Any]:
    """The earlier run's row of the matrix, after those that it had itself."""
    history = read_history(earlier)
    found = dict(earlier.read_json(FILE)) if (earlier.path / FILE).is_file() else {}
    scores = history.scores
    last = scores[max(scores)] if scores else {}
    row = {"run": earlier.name, "task": history.config.task, "scores": last}
    return {
        "untuned": found.get("untuned", scores[min(scores)] if scores else {}),
        "learned": [*found.get("learned", ()), row],
    }
