"""Throughput: real (unpadded) tokens per second of our engine against TRL's SFTTrainer.

    python -m benchmarks.throughput

Every contender runs alone in a process of its own, one after the other, on the same quantized
model, adapter, texts and optimizer batch, in the same precision; the first steps are not
counted. Two rows for TRL's padded batches: its defaults recompute activations, the second does
not. Packed TRL gets as many rows of 512 tokens as hold about the batch's tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("fedqlora", "trl defaults", "trl, no recomputation", "trl packing")
ROW_TOKENS = 512
DEMO_MODEL = Path(__file__).parents[1] / ".cache" / "models" / "smollm2-135m-instruct"


def main() -> None:
    """Run all contenders and print a table, or one of them for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="folder of a causal model (default: demo's)"
    )
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before")
    parser.add_argument("--batch", type=int, default=16, help="examples of an optimizer step")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(_run(arguments)))
        return
    if arguments.model == DEMO_MODEL:
        from demo.model import make_model

        make_model(DEMO_MODEL)
    results = {}
    for contender in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:]]
        done = subprocess.run(
            [*command, "--contender", contender], check=True, stdout=subprocess.PIPE, text=True
        )
        results[contender] = json.loads(done.stdout.strip().rpartition("\n")[2])
    ours = results[CONTENDERS[0]]
    print("| engine | real tokens/s (median step) | step s | real tokens a step | ours is |")
    print("|---|---|---|---|---|")
    for contender, found in results.items():
        ratio = ours["tokens_per_second"] / found["tokens_per_second"]
        print(
            f"| {contender} | {found['tokens_per_second']:.0f} | {found['seconds']:.2f} "
            f"| {found['tokens']:.0f} | {ratio:.2f} x |"
        )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the module's line breaks."""


def _make_texts(count: int) -> list[dict[str, str]]:
    """Diagnosis-like lines of unequal length, the same in every process."""
    words = ["acute", "chronic", "fracture of the", "disorder of", "left", "right", "unspecified",
             "ulcer", "with bleeding", "lower leg", "initial encounter", "neoplasm of"]  # fmt: skip
    return [
        {
            "prompt": "Diagnosis: "
            + " ".join(words[(i * 7 + 5 * k) % 12] for k in range(2 + (i * i) % 11))
            + "\nBody system:",
            "completion": f" Nervous system, G{i % 90 + 10}",
        }
        for i in range(count)
    ]


def _run(arguments: argparse.Namespace) -> dict[str, float]:
    """Median step of one contender: seconds and real tokens."""
    from fedqlora.config import ModelConfig
    from fedqlora.engine.model import BaseModel
    from fedqlora.lora_config import LoraConfig

    base = BaseModel.load(arguments.model, ModelConfig(base=arguments.model.name), LoraConfig())
    texts = _make_texts((arguments.steps + arguments.warmup) * arguments.batch)
    if arguments.contender == CONTENDERS[0]:
        steps = _time_ours(base, texts, arguments)
    else:
        steps = _time_trl(base, texts, arguments)
    seconds = [step[0] for step in steps[arguments.warmup :]]
    tokens = [step[1] for step in steps[arguments.warmup :]]
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    return {
        "tokens_per_second": statistics.median(rates),
        "seconds": statistics.median(seconds),
        "tokens": statistics.fmean(tokens),
    }


def _time_ours(
    base: Any, texts: list[dict[str, str]], arguments: argparse.Namespace
) -> list[tuple[float, int]]:
    """(seconds, real tokens) of each step of our engine, one step a call."""
    from fedqlora.adapter import initial_adapter
    from fedqlora.engine.data import Record, tokenize
    from fedqlora.engine.train import train
    from fedqlora.training_config import TrainingConfig

    records = [
        Record(messages=None, patient=str(i), fields={}, **text) for i, text in enumerate(texts)
    ]
    examples = tokenize(records, base.tokenizer, base.family, ROW_TOKENS)
    config = TrainingConfig(steps=1, batch_examples=arguments.batch)
    adapter = initial_adapter(base.spec(), 1, base.given())
    steps = []
    for start in range(0, len(examples), arguments.batch):
        part = examples[start : start + arguments.batch]
        trained = train(base, adapter, part, config, seed=1, site="a", round_=1, rounds=1)
        steps.append((trained.step_seconds, sum(len(e.prompt + e.completion) for e in part)))
    return steps


def _time_trl(
    base: Any, texts: list[dict[str, str]], arguments: argparse.Namespace
) -> list[tuple[float, int]]:
    """(seconds, real tokens) of each step of TRL's trainer."""
    import datasets
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    packing = arguments.contender == "trl packing"
    average = sum(
        len(base.tokenizer(text["prompt"] + text["completion"])["input_ids"]) + 1 for text in texts
    ) / len(texts)
    rows = max(round(average * arguments.batch / ROW_TOKENS), 1) if packing else arguments.batch
    seen = 0
    marks: list[tuple[float, int]] = []

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal seen
        mask = kwargs.get("attention_mask")
        seen += int(kwargs["input_ids"].numel() if mask is None else mask.sum())

    class Marks(transformers.TrainerCallback):
        """Notes time and tokens at the start and the end of each step."""

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            marks.append((time.perf_counter(), seen))

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            marks.append((time.perf_counter(), seen))

    base.model.register_forward_pre_hook(count, with_kwargs=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = arguments.contender == "trl defaults"
        extra: dict[str, Any] = {} if plain else {"activation_checkpointing": False}
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=rows, learning_rate=1e-3,
            max_steps=arguments.steps + arguments.warmup, max_length=ROW_TOKENS, packing=packing,
            bf16="bfloat16" in str(base.compute_dtype), use_cpu=base.device.type == "cpu",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            num_train_epochs=1000, **extra,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=base.model, args=config, train_dataset=datasets.Dataset.from_list(texts),
            processing_class=base.tokenizer, callbacks=[Marks()],
        )  # fmt: skip
        trainer.train()
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return [(end - start, after - before) for (start, before), (end, after) in pairs]


if __name__ == "__main__":
    main()
