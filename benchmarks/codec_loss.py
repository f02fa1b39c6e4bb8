"""Held-out loss of a federation whose updates are sent as float32 and in another encoding.

SmolLM2-135M in 4 bits, three hospitals of ICD-10-CM texts, one process: the same seeds, steps
and data, only the encoding differs. Each seed takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.federation import Federation, load_experiment
from fedqlora.config import RunConfig, validate


def main() -> None:
    """Print one row a seed and encoding, each as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--encodings", nargs="+", default=["nf4"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    experiment = load_experiment(options.rounds, options.steps)
    federation = Federation.load(experiment, 3)
    print(f"{options.rounds} rounds of {options.steps} steps, three hospitals:\n")
    print("| seed | encoding | bytes of an update, ratio | held-out loss | beside float32 |")
    print("|---|---|---|---|---|")
    for seed in options.seeds:
        loss = size = 0.0
        for encoding in ("float32", *options.encodings):
            values = experiment.model_dump() | {"seed": seed, "codec": {"update": encoding}}
            run = validate(RunConfig, values, "benchmark")
            with tempfile.TemporaryDirectory() as folder:
                adapter, own_size = federation.run(run, Path(folder))
            own_loss = federation.score(run, adapter)
            if encoding == "float32":
                loss, size = own_loss, own_size
            print(
                f"| {seed} | {encoding} | {size / own_size:.2f} | {own_loss:.4f} "
                f"| {own_loss / loss - 1:+.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
