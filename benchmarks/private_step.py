"""A private step beside a plain one, the same batch: time and peak memory, as ratios.

SmolLM2-135M in NF4 on the demo's texts, each way in a process of its own:

    plain    gradients of the batch's mean, unpacked rows, clipped as one
    private  each example's gradient by an autograd function around each LoRA layer, clipped, noised
    single   the same from one backward pass per example
    opacus   the same from Opacus' hooks
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from opacus.grad_sample import GradSampleModule

from benchmarks.federation import Federation, load_experiment
from fedqlora.engine.data import Tokenized
from fedqlora.engine.dp import sum_clipped
from fedqlora.engine.loss import plan_batches, sum_losses
from fedqlora.engine.model import BaseModel
from fedqlora.privacy.noise import SecureNoise
from fedqlora.training_config import TrainingConfig

CLIP = 1.0
WAYS = ("plain", "private", "single", "opacus")


def step_plain(base: BaseModel, batch: list[Tokenized], config: TrainingConfig) -> None:
    """Gradients of the mean token loss, clipped as one."""
    for part in plan_batches(base, batch, config):
        sum_losses(base, part).backward()  # type: ignore[no-untyped-call]
    parameters = base.trainable().values()
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    for parameter in parameters:
        parameter.grad = None


def step_private(base: BaseModel, batch: list[Tokenized], config: TrainingConfig) -> None:
    """The engine's own private gradients, with noise."""
    total, _ = sum_clipped(base, [[example] for example in batch], config, CLIP)
    add_noise(total)


def step_single(base: BaseModel, batch: list[Tokenized], config: TrainingConfig) -> None:
    """One backward pass an example."""
    total = {name: torch.zeros_like(p) for name, p in base.trainable().items()}
    for example in batch:
        for part in plan_batches(base, [example], config):
            sum_losses(base, part).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in base.trainable().items() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            total[name] += gradient * (CLIP / norm).clamp(max=1.0)
            base.trainable()[name].grad = None
    add_noise(total)


def make_step_opacus(base: BaseModel) -> Callable[..., None]:
    """Opacus' hooks on the same model; a microbatch at a time, as it keeps all activations."""
    wrapped = GradSampleModule(base.model, loss_reduction="sum", strict=False)

    def step(base: BaseModel, batch: list[Tokenized], config: TrainingConfig) -> None:
        total = {name: torch.zeros_like(p) for name, p in base.trainable().items()}
        for part in plan_batches(base, batch, config):
            sum_losses(base, part).backward()  # type: ignore[no-untyped-call]
            samples = {name: p.grad_sample for name, p in base.trainable().items()}  # type: ignore[attr-defined]
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()]).norm(dim=0)
            factors = (CLIP / norms).clamp(max=1.0)
            for name, sample in samples.items():
                total[name] += torch.tensordot(factors, sample, dims=1)
            wrapped.zero_grad(set_to_none=True)
            for parameter in base.trainable().values():
                parameter.grad_sample = None  # type: ignore[attr-defined]
        add_noise(total)

    return step


def add_noise(total: dict[str, torch.Tensor]) -> None:
    """Noise for every tensor, as a private round draws it."""
    secure = SecureNoise()
    for value in total.values():
        value += torch.from_numpy(secure.normal(value.numel())).view_as(value)


def measure(way: str, examples: int, steps: int) -> None:
    """Print seconds of a step, and the peak of this process beyond the loaded model, as JSON."""
    torch.manual_seed(1)
    run = load_experiment(1, steps)
    federation = Federation.load(run, 3)
    base, config = federation.base, run.training.model_copy(update={"packing": False})
    base.set_adapter(federation.start(run))
    base.model.train()
    batch = federation.sites["a"][:examples]
    step = {"plain": step_plain, "private": step_private, "single": step_single}.get(way)
    if step is None:
        step = make_step_opacus(base)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step(base, batch, config)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": median(seconds[1:]), "mib": peak / 1024, "own": loaded / 1024}))


def main() -> None:
    """Measure each way in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="the first is warm-up")
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.examples, options.steps)
        return
    print(f"{options.examples} examples a step:\n\n| step | seconds | time | peak MiB | memory |")
    print("|---|---:|---:|---:|---:|")
    plain: dict[str, float] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.private_step", "--way", way]
        sizes = ["--examples", str(options.examples), "--steps", str(options.steps)]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        plain = plain or found
        print(
            f"| {way} | {found['seconds']:.2f} | {found['seconds'] / plain['seconds']:.2f} "
            f"| {found['mib']:.0f} | {found['mib'] / plain['mib']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
