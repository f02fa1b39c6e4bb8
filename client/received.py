"""What an instruction to train brings: the adapter, and what lies or pulls beside it."""

from __future__ import annotations

import math

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, check_residual, check_update, lower_rank
from fedqlora.codec import decode
from fedqlora.config import RunConfig
from fedqlora.engine.model import BaseModel
from fedqlora.engine.penalty import Penalty
from fedqlora.errors import UpdateError


def read_adapters(
    base: BaseModel, config: RunConfig, body: pb.Train, rank: int
) -> tuple[Adapter, Adapter]:
    """The adapter that trains at a site and the residual beside it, from what was sent.

    Args:
        base: the site's base model.
        config: the run.
        body: the instruction.
        rank: the site's own, at most the run's; the rest of the adapter goes to the residual.

    Raises:
        UpdateError: one of them is not for this base and this run.
    """
    adapter = decode(body.adapter)
    residual = decode(body.residual) if body.HasField("residual") else {}
    spec = base.spec().at_rank(config.lora.rank)
    check_update(adapter, spec, math.inf)
    check_residual(residual, spec, config.residual_rank)
    if rank == config.lora.rank:
        return adapter, residual
    return lower_rank(adapter, residual, rank, config.lora.scale)


def read_penalty(base: BaseModel, config: RunConfig, body: pb.Train) -> Penalty | None:
    """What the products are held to, where the run asks for it.

    Raises:
        UpdateError: what was sent is not of this base and this run.
    """
    if config.continual.penalty == 0:
        return None
    if not body.HasField("anchor"):
        raise UpdateError("the instruction has no anchor for continual.penalty; send one")
    anchor = decode(body.anchor)
    check_residual(anchor, base.spec(), config.lora.rank + config.residual_rank)
    return Penalty(weight=config.continual.penalty, scale=config.lora.scale, anchor=anchor)
