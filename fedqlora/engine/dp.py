"""DP-SGD: a private round on the 4-bit base, its unit one example or one patient.

Abadi et al. 2016 (arXiv 1607.00133): in each step every unit enters with probability q; a
unit's gradient, summed over its examples, is clipped to C over all trainable tensors; Gaussian
noise of standard deviation sigma C is added to the sum, which is divided by the *expected* number
of units.

Guarantees, each restated in tests/engine/test_dp.py:

- Per-unit gradients equal those of one example at a time, up to 1e-5, also on NF4 and with
  recomputed activations. A model in which they do not is refused by `check_exactness`, which
  names the layer: a test on the model itself, not a list of names.
- One unit more or less moves the sum by at most C. A gradient that is not finite counts as zero.
- Sampling and noise come from ChaCha20 under a key from the operating system, fresh each round:
  numpy's and torch's generators can be run backwards from their output.
- A step in which no unit is drawn adds its noise and counts like any other.

Noise is rounded to float32; attacks on floating-point noise (Mironov 2012) are not excluded.

Shape letters: R rows, L tokens of a row, U units, K targets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fedqlora.adapter import Adapter, subtract
from fedqlora.engine.batch import Microbatch, count_targets
from fedqlora.engine.data import Tokenized
from fedqlora.engine.gradients import check_gradients
from fedqlora.engine.loss import compute_logits, plan_batches
from fedqlora.engine.model import BaseModel
from fedqlora.engine.persample import UnitGradients
from fedqlora.engine.records import NAMELESS
from fedqlora.engine.train import Trained, learning_rate, make_optimizer, set_checkpointing
from fedqlora.errors import DataError, PrivacyError
from fedqlora.privacy.noise import SecureNoise
from fedqlora.training_config import TrainingConfig

logger = logging.getLogger("fedqlora")

Unit = Sequence[Tokenized]
"""All the examples of one patient, or one example."""


def group_units(
    examples: Sequence[Tokenized], patients: Sequence[str], unit: str, most: int
) -> list[Unit]:
    """A site's examples by unit.

    Args:
        examples: what `tokenize` gave.
        patients: whose each of them is, as `Record.patient`.
        unit: `example` or `patient`.
        most: the first so many of a patient's examples are kept.

    Raises:
        DataError: the unit is the patient and a record names none.
    """
    if unit == "example":
        return [[example] for example in examples]
    if any(patient.startswith(NAMELESS) for patient in patients):
        raise DataError(
            "privacy.unit is patient and some records have no patient_id; add that column, or ask "
            "for the unit example"
        )
    units: dict[str, list[Tokenized]] = {}
    for example, patient in zip(examples, patients, strict=True):
        units.setdefault(patient, []).append(example)
    return [unit[:most] for unit in units.values()]


def train_privately(
    base: BaseModel,
    adapter: Adapter,
    units: Sequence[Unit],
    config: TrainingConfig,
    *,
    clip_norm: float,
    noise_multiplier: float,
    sampling_rate: float,
    round_: int,
    rounds: int,
    residual: Adapter | None = None,
    trained: Collection[str] | None = None,
) -> Trained:
    """Train one private round. Two calls never give the same delta.

    Only what trains is clipped and gets noise, which is the shorter the fewer values train; a
    half that does not stays as it was sent, to the bit.

    Args:
        base: the model; its adapter is set to `adapter` first.
        adapter: the global adapter.
        units: what may be drawn; a unit without a completion counts and adds nothing.
        config: steps and learning rate; `max_grad_norm` is not applied.
        clip_norm: C.
        noise_multiplier: sigma.
        sampling_rate: q; the expected number of units in a step is q times the units there are.
        round_: the number of this round, from 1.
        rounds: all rounds of the run.
        residual: what lies frozen beside the adapter; None for nothing.
        trained: names of the tensors that train; None for all.

    Returns:
        The delta of what trains; its counts and loss are of the data and must not leave the site.

    Raises:
        PrivacyError: some layer's gradients cannot be told apart by example.
        UpdateError: `adapter` is not one for this base.
    """
    base.set_adapter(adapter)
    check_exactness(base, config)
    base.set_adapter(adapter, residual, trained)
    base.model.train()
    set_checkpointing(base, config.gradient_checkpointing)
    parameters = base.trainable()
    optimizer = make_optimizer(list(parameters.values()), config, base.device)
    secure = SecureNoise()
    expected = sampling_rate * len(units)
    seen = tokens = 0
    loss = 0.0
    started = time.perf_counter()
    for step in range(config.steps):
        drawn = [unit for unit in units if secure.draw(sampling_rate)]
        total, step_loss = sum_clipped(base, drawn, config, clip_norm)
        for name, parameter in parameters.items():
            noise = secure.normal(parameter.numel()) * (noise_multiplier * clip_norm)
            added = torch.from_numpy(noise).to(parameter.device).view_as(parameter)
            parameter.grad = (total[name] + added) / expected
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                config, (round_ - 1) * config.steps + step, rounds * config.steps
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss += step_loss
        seen += sum(len(unit) for unit in drawn)
        tokens += sum(count_targets(e, base.family) for unit in drawn for e in unit)
    seconds = time.perf_counter() - started
    logger.info("round %d of %d: %d private steps in %.1f s", round_, rounds, config.steps, seconds)
    after = base.get_adapter()
    return Trained(
        delta=subtract({name: after[name] for name in parameters}, adapter),
        examples=seen,
        tokens=tokens,
        loss=loss / max(seen, 1),
        step_seconds=seconds,
    )


def sum_clipped(
    base: BaseModel, units: Sequence[Unit], config: TrainingConfig, clip_norm: float
) -> tuple[dict[str, Tensor], float]:
    """Sum over units of their gradients, each scaled to a norm of at most `clip_norm`.

    Returns:
        The sum by the adapter's names, float32, and the summed loss (not private).
    """
    parameters = base.trainable()
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    loss = 0.0
    for group in _group_units(units, base.family, config.microbatch_tokens):
        gradients, part = unit_gradients(base, group, config)
        # Of a spread model the layers are on several GPUs.
        parts = [g.flatten(1).square().sum(1).to(base.device) for g in gradients.values()]
        squares = torch.stack(parts).sum(0)
        factors = (clip_norm / squares.sqrt()).clamp(max=1.0)
        # Past float32's range a square is not finite though the gradient is: zero is safe.
        factors = torch.where(squares.isfinite() & (squares > 0), factors, 0.0)
        for name, gradient in gradients.items():
            # Not finite times zero is not zero.
            clean = gradient.nan_to_num_(0.0, 0.0, 0.0)
            total[name] += torch.tensordot(factors.to(clean.device), clean, dims=1)
        loss += part
    return total, loss


def unit_gradients(
    base: BaseModel, units: Sequence[Unit], config: TrainingConfig
) -> tuple[dict[str, Tensor], float]:
    """Gradient of each unit: of the mean token loss of its examples, summed over them.

    Returns:
        (U, *shape) float32 by the adapter's names, and the loss summed over everything.

    Raises:
        PrivacyError: a layer does not keep the rows apart.
    """
    examples = [e for unit in units for e in unit]
    owners = torch.tensor([i for i, unit in enumerate(units) for _ in unit], device=base.device)
    total = 0.0
    with UnitGradients(base.trainable(), base.model, len(units)) as gradients:
        for batch, rows in _rows(base, examples, config):
            gradients.expect(owners[rows])
            loss = _example_losses(base, batch, len(rows)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return gradients.values, total


def check_exactness(base: BaseModel, config: TrainingConfig) -> None:
    """Refuse a model whose examples' gradients cannot be told apart; asked on made-up tokens.

    Asked once a model, of both halves of the adapter, whichever of them trains; afterwards both
    do, with the values that they had and nothing beside them.

    Raises:
        PrivacyError: names the first layer whose gradient of one example in a batch differs from
            that of the example alone.
        ModelError: names a layer whose adapter the loss does not reach.
    """
    for name, module in base.model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"layer {name} joins the examples of a batch, so one patient's share cannot be "
                "bounded; choose a model without batch normalisation"
            )
    if base.separable:
        return
    count = min(base.model.config.get_text_config().vocab_size, 64)
    made = [
        Tokenized(tuple((7 * i + j) % count for j in range(3 + i)), tuple(range(i, i + 3)))
        for i in range(3)
    ]
    # While B is zero A has no gradient, which would compare nothing with nothing.
    kept = base.get_adapter()
    training = base.model.training
    base.set_adapter({n: v + 0.01 if ".lora_B." in n else v for n, v in kept.items()})
    base.model.eval()
    try:
        together, _ = unit_gradients(base, [[e] for e in made], config)
        check_gradients(together)
        for place, example in enumerate(made):
            alone, _ = unit_gradients(base, [[example]], config)
            flat = sum(float(gradient.square().sum()) for gradient in alone.values()) ** 0.5
            for name, gradient in alone.items():
                gap = float((together[name][place] - gradient[0]).norm())
                # bfloat16 keeps 8 bits, and rows of another number may be multiplied otherwise.
                close = 1e-3 if base.compute_dtype == torch.float32 else 0.1
                # Some gradients are zero but for rounding, so the whole one's size counts too: 30
                # layers of SmolLM2 in NF4 differ by up to 5e-5 of it.
                if gap > close * max(float(gradient.norm()), flat / 10):
                    raise _inseparable(name)
    finally:
        base.set_adapter(kept)
        base.model.train(training)
    base.separable = True


def _inseparable(name: str) -> PrivacyError:
    return PrivacyError(
        f"layer {name.partition('.lora_')[0]} does not keep the examples of a batch apart, so one "
        "patient's share cannot be bounded; leave it out of lora.targets"
    )


def _rows(
    base: BaseModel, examples: Sequence[Tokenized], config: TrainingConfig
) -> Iterator[tuple[Microbatch, list[int]]]:
    """Padded microbatches, with the number of the example in each row."""
    usable = [i for i, e in enumerate(examples) if count_targets(e, base.family) > 0]
    if not usable:
        return
    padded = config.model_copy(update={"packing": False})
    for batch in plan_batches(base, [examples[i] for i in usable], padded):
        yield batch, [usable[row] for row in batch.rows]


def _example_losses(base: BaseModel, batch: Microbatch, rows: int) -> Tensor:
    """(R,) mean token loss of each row.

    Not the library's own loss: that is a mean over the batch's tokens, in which the length of one
    example changes the gradient of another.
    """
    logits = compute_logits(base, batch).float()
    losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    key = "decoder_input_ids" if base.family == "seq2seq" else "input_ids"
    row = batch.keep // batch.inputs[key].shape[1]
    counts = torch.bincount(row, minlength=rows)
    return torch.zeros(rows, device=losses.device).index_add(0, row, losses) / counts


def _group_units(units: Sequence[Unit], family: str, limit: int) -> Iterator[list[Unit]]:
    """Units of similar length, as many as fit into a microbatch; a large one is alone."""

    def longest(unit: Unit) -> int:
        return max(
            (len(e.prompt) + len(e.completion) * (family == "causal") for e in unit), default=1
        )

    group: list[Unit] = []
    rows = width = 0
    for unit in sorted(units, key=longest, reverse=True):
        if group and (rows + len(unit)) * width > limit:
            yield group
            group, rows = [], 0
        if not group:
            width = -(-longest(unit) // 64) * 64
        group.append(unit)
        rows += len(unit)
    if group:
        yield group
