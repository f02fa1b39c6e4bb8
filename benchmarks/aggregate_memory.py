"""Peak memory of folding in updates: ours as they arrive, Flower's FedAvg all at once.

Each way runs in a process of its own; the figure is its peak resident memory above what it
held before the first update. Prints two markdown tables: ours against Flower's, and `fedavg`
and `exact_svd` over the number of sites.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, check_update
from fedqlora.codec import decode, encode
from fedqlora.envelope import sign
from server.aggregation.aggregate import Aggregator
from server.aggregation.exact_svd import ExactSvd
from server.aggregation.fedavg import FedAvg
from server.answer import open_reply

# Sixteen layers of 9760 x 9760 at rank 16: 5 million values, 20 MB of float32.
LAYERS, WIDTH, RANK = 16, 9760, 16
SHAPES = {
    f"m.{layer}.lora_{half}.weight": (RANK, WIDTH) if half == "A" else (WIDTH, RANK)
    for layer in range(LAYERS)
    for half in "AB"
}
VALUES = LAYERS * 2 * WIDTH * RANK
COUNTS = (4, 16, 64)

FILES = 4  # distinct updates; more would only fill the disk
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def write_updates(folder: Path) -> None:
    """The same updates as both ways receive them: signed envelopes, and plain arrays."""
    for number in range(FILES):
        random = np.random.default_rng(number)
        arrays = {
            name: random.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()
        }
        np.savez(folder / f"{number}.npz", **arrays)  # type: ignore[arg-type]
        update = pb.Update(delta=encode(arrays, "float32"), examples=number + 1)
        envelope = sign(
            KEY,
            run="r",
            round_=1,
            site="a",
            kind=pb.UPDATE,
            issued=1,
            payload=update.SerializeToString(),
            replies_to=b"i",
        )
        (folder / f"{number}.envelope").write_bytes(envelope)


def fold_in(folder: Path, count: int, aggregator: Aggregator, spec: AdapterSpec) -> Adapter:
    """Ours: verify, decode, check and fold one update at a time."""
    for number in range(count):
        _, update = open_reply(
            (folder / f"{number % FILES}.envelope").read_bytes(),
            KEY.public_key(),
            site="a",
            instruction=b"i",
            asked=pb.TRAIN,
        )
        if not isinstance(update, pb.Update):
            raise SystemExit("the stored reply is not an update")
        delta = decode(update.delta)
        check_update(delta, spec, 1e9)
        aggregator.add(f"site-{number}", delta, update.examples)
        del update, delta
    return aggregator.finish().adapter


def start_fedavg(adapter: Adapter) -> Aggregator:
    """The mean of factors."""
    return FedAvg(adapter)


def start_exact_svd(adapter: Adapter) -> Aggregator:
    """The mean of products, with the default residual rank."""
    return ExactSvd(adapter, {}, scale=1.0, residual_rank=4 * RANK)


def hold_all(folder: Path, count: int) -> Adapter:
    """Flower's own strategy, which is handed all replies of a round."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    replies = []
    for number in range(count):
        with np.load(folder / f"{number % FILES}.npz") as stored:
            arrays = [stored[name] for name in SHAPES]
        content = RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "metrics": MetricRecord({"num-examples": number % FILES + 1}),
            }
        )
        replies.append(Message(content, 1, "train"))
    result, _ = strategy.FedAvg().aggregate_train(1, replies)
    if result is None:
        raise SystemExit("Flower's FedAvg aggregated nothing")
    return dict(zip(SHAPES, result.to_numpy_ndarrays(), strict=True))


def read_memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; getrusage inherits the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"no {field} in /proc/self/status; this benchmark needs Linux")


def run(way: str, folder: str, updates: int) -> tuple[float, float]:
    """Peak memory in MiB and a checksum of the result, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.aggregate_memory", "--way", way]
    command += ["--folder", folder, "--updates", str(updates)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, checksum = map(float, output.split()[-2:])
    return peak, checksum


def measure(way: str, folder: Path, count: int) -> None:
    """One way in this process: print its peak and a checksum."""
    before = read_memory("VmRSS")
    if way == "flower":
        result = hold_all(folder, count)
    else:
        adapter = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
        start = {"fedavg": start_fedavg, "exact_svd": start_exact_svd}[way]
        result = fold_in(folder, count, start(adapter), AdapterSpec.of(adapter))
    checksum = float(next(iter(result.values())).reshape(-1)[:1000].sum(dtype=np.float64))
    print(read_memory("VmHWM") - before, checksum)


def main() -> None:
    """Run every way and print, or one of them in a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=("fedavg", "exact_svd", "flower"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.folder, options.updates)
        return
    most = COUNTS[-1]
    with tempfile.TemporaryDirectory() as folder:
        write_updates(Path(folder))
        theirs, sum_theirs = run("flower", folder, most)
        ours = {count: run("fedavg", folder, count) for count in COUNTS}
        exact = {count: run("exact_svd", folder, count)[0] for count in COUNTS}
    peak, sum_ours = ours[most]
    if abs(sum_ours - sum_theirs) > 1e-3 * max(1.0, abs(sum_theirs)):
        raise SystemExit(f"the two means differ: {sum_ours} and {sum_theirs}")
    print(f"{most} updates of {VALUES * 4 / 1e6:.0f} MB, the same weighted mean:\n")
    print("| aggregation | peak memory, MiB | ratio |\n|---|---|---|")
    print(f"| ours, folded in as they arrive | {peak:.0f} | {peak / theirs:.3f} |")
    print(f"| Flower's FedAvg | {theirs:.0f} | 1 |\n")
    print("| sites | " + " | ".join(map(str, COUNTS)) + " |\n|---|---|---|---|")
    print("| fedavg, MiB | " + " | ".join(f"{ours[count][0]:.0f}" for count in COUNTS) + " |")
    print("| exact_svd, MiB | " + " | ".join(f"{exact[count]:.0f}" for count in COUNTS) + " |")


if __name__ == "__main__":
    main()
