"""Training: what one site does in one round, from the global adapter to its delta.

One learning-rate schedule runs over all rounds, while the optimizer's moments start fresh
each round. The loss is the mean over the completion tokens of the whole optimizer batch, so a
batch that is accumulated in several passes gives the gradient of one pass.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit
from tqdm import tqdm  # type: ignore[import-untyped]

from fedqlora.adapter import Adapter, subtract
from fedqlora.engine.batch import count_targets
from fedqlora.engine.data import Tokenized
from fedqlora.engine.drift import Drift
from fedqlora.engine.gradients import check_gradients
from fedqlora.engine.loss import plan_batches, sum_losses
from fedqlora.engine.model import BaseModel
from fedqlora.engine.orthogonal import Orthogonal
from fedqlora.engine.penalty import Penalty, ProductPenalty
from fedqlora.errors import DataError, ModelError
from fedqlora.training_config import TrainingConfig

logger = logging.getLogger("fedqlora")


@dataclass(frozen=True)
class Trained:
    """A round's result at one site.

    Attributes:
        delta: trained adapter minus the adapter that was sent, of the tensors that train.
        examples: examples seen, repeats counted.
        tokens: completion tokens trained on, repeats counted.
        loss: mean loss of a completion token over the round, before each step's update.
        step_seconds: time inside optimizer steps.
        gradient: mean of the uncorrected gradients, where a correction was given; else empty.
    """

    delta: Adapter
    examples: int
    tokens: int
    loss: float
    step_seconds: float
    gradient: Adapter = field(default_factory=dict)


def train(
    base: BaseModel,
    adapter: Adapter,
    examples: Sequence[Tokenized],
    config: TrainingConfig,
    *,
    seed: int,
    site: str,
    round_: int,
    rounds: int,
    residual: Adapter | None = None,
    trained: Collection[str] | None = None,
    correction: Adapter | None = None,
    penalty: Penalty | None = None,
    orthogonal: bool = False,
) -> Trained:
    """Train one round; the same inputs give the same delta, to the bit on a CPU.

    Args:
        base: the model; its adapter is set to `adapter` first.
        adapter: the global adapter.
        examples: the site's training examples.
        config: steps, batch, learning rate.
        seed: the run's seed.
        site: the site's name, which makes its data order its own.
        round_: the number of this round, from 1.
        rounds: all rounds of the run, over which the learning rate is scheduled.
        residual: what lies frozen beside the adapter; None for nothing.
        trained: names of the tensors that train; None for all.
        correction: what SCAFFOLD adds to each step's gradient; None for nothing.
        penalty: what the products are held to; None for nothing.
        orthogonal: whether A stays orthogonal to the residual's.

    Raises:
        DataError: no example has a completion token to learn.
        ModelError: an adapter tensor gets no gradient, or training has diverged.
        UpdateError: `adapter` is not one for this base.
    """
    usable = [e for e in examples if count_targets(e, base.family) > 0]
    if not usable:
        raise DataError("no training example has a completion to learn; check the data file")
    base.set_adapter(adapter, residual, trained)
    base.model.train()
    set_checkpointing(base, config.gradient_checkpointing)
    parameters = base.trainable()
    optimizer = make_optimizer(list(parameters.values()), config, base.device)
    drift = Drift(parameters, config.proximal, correction)
    held = ProductPenalty(penalty, base.tensors(), residual or {}) if penalty else None
    apart = Orthogonal(parameters, residual or {}) if orthogonal else None
    draw = _draw_examples(len(usable), _derive_seed(seed, site, round_, "order"))
    loss = 0.0
    tokens = 0
    started = time.perf_counter()
    with torch.random.fork_rng(devices=base.gpus):
        torch.manual_seed(_derive_seed(seed, site, round_, "dropout"))
        bar = tqdm(range(config.steps), desc=f"round {round_}", disable=not sys.stderr.isatty())
        for step in bar:
            chosen = [usable[next(draw)] for _ in range(config.batch_examples)]
            count = sum(count_targets(e, base.family) for e in chosen)
            step_loss = _accumulate(base, chosen, count, config)
            if step == 0:
                check_gradients({name: p.grad for name, p in parameters.items()})
            drift.correct()
            if held is not None:
                held.add_gradients()
            rate = learning_rate(config, (round_ - 1) * config.steps + step, rounds * config.steps)
            _update(parameters, optimizer, rate, config.max_grad_norm, step)
            if apart is not None:
                apart.project()
            loss += step_loss
            tokens += count
            bar.set_postfix(loss=f"{step_loss / count:.3f}")
    seconds = time.perf_counter() - started
    for parameter in parameters.values():
        parameter.grad = None
    logger.info(
        "round %d of %d: %d steps in %.1f s, mean loss %.4f",
        round_,
        rounds,
        config.steps,
        seconds,
        loss / tokens,
    )
    after = base.get_adapter()
    return Trained(
        delta=subtract({name: after[name] for name in parameters}, adapter),
        examples=config.steps * config.batch_examples,
        tokens=tokens,
        loss=loss / tokens,
        step_seconds=seconds,
        gradient=drift.mean_gradient(),
    )


def mean_loss(
    base: BaseModel,
    adapter: Adapter,
    examples: Sequence[Tokenized],
    config: TrainingConfig,
    residual: Adapter | None = None,
) -> float:
    """Mean loss of a completion token, without dropout; NaN if no example has one."""
    usable = [e for e in examples if count_targets(e, base.family) > 0]
    base.set_adapter(adapter, residual)
    if not usable:
        return math.nan
    base.model.eval()
    with torch.no_grad():
        batches = plan_batches(base, usable, config)
        total = sum(float(sum_losses(base, batch)) for batch in batches)
    return total / sum(len(batch.targets) for batch in batches)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of a step, counted from 0 over the `steps` of all rounds.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; `linear` and `cosine`
    then fall so that the step after the last would be at 0.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    factor = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]
    return config.learning_rate * factor


def _accumulate(
    base: BaseModel, chosen: Sequence[Tokenized], count: int, config: TrainingConfig
) -> float:
    """Gradients of the mean over the batch's tokens; returns the summed loss."""
    total = 0.0
    for batch in plan_batches(base, chosen, config):
        loss = sum_losses(base, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _update(
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_norm: float,
    step: int,
) -> None:
    """Clip, step and clear the gradients."""
    size = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    if not bool(torch.isfinite(size)):
        raise ModelError(
            f"training diverged at step {step + 1} of the round: the gradient is not finite; "
            "lower training.learning_rate"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; on CUDA with 8-bit moments in paged memory."""
    if device.type == "cuda":
        paged: torch.optim.Optimizer = PagedAdamW8bit(  # type: ignore[no-untyped-call]
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        return paged
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def set_checkpointing(base: BaseModel, wanted: bool) -> None:
    """Turn activation checkpointing on or off on the base model."""
    model = base.model.get_base_model()
    if not wanted:
        model.activation_checkpointing_disable()
    elif model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations; "
            "set training.gradient_checkpointing = false"
        )


def _derive_seed(seed: int, site: str, round_: int, purpose: str) -> int:
    """A seed of its own for each site, round and purpose."""
    text = f"{seed}:{site}:{round_}:{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _draw_examples(count: int, seed: int) -> Iterator[int]:
    """Indices without end: a new shuffle each time all have been drawn."""
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield from (int(index) for index in generator.permutation(count))
