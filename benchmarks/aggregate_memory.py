"""Peak memory of folding in updates: ours as they arrive, Flower's FedAvg all at once.

Each way runs in a process of its own; the figure is its peak resident memory above what it
held before the first update. Prints a markdown table.
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
from fedqlora.adapter import AdapterSpec, check_update
from fedqlora.codec import decode, encode
from fedqlora.envelope import sign
from server.aggregation.fedavg import FedAvg
from server.exchange import open_reply

VALUES = 5_000_000  # 20 MB of float32
NAME = "m.lora_A.weight"


FILES = 4  # distinct updates; more would only fill the disk
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def write_updates(folder: Path) -> None:
    """The same updates as both ways receive them: signed envelopes, and plain arrays."""
    for number in range(FILES):
        random = np.random.default_rng(number)
        array = random.standard_normal(VALUES, dtype=np.float32)
        np.save(folder / f"{number}.npy", array)
        update = pb.Update(delta=encode({NAME: array}, "float32"), examples=number + 1)
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


def fold_in(folder: Path, count: int) -> np.ndarray:
    """Ours: verify, decode, check and fold one update at a time."""
    adapter = {NAME: np.zeros(VALUES, dtype=np.float32)}
    spec, fold = AdapterSpec.of(adapter), FedAvg(adapter)
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
        fold.add(delta, update.examples)
        del update, delta
    return fold.finish()[NAME]


def hold_all(folder: Path, count: int) -> np.ndarray:
    """Flower's own strategy, which is handed all replies of a round."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    replies = []
    for number in range(count):
        array = np.load(folder / f"{number % FILES}.npy")
        content = RecordDict(
            {
                "arrays": ArrayRecord([array]),
                "metrics": MetricRecord({"num-examples": number % FILES + 1}),
            }
        )
        replies.append(Message(content, 1, "train"))
    arrays, _ = strategy.FedAvg().aggregate_train(1, replies)
    if arrays is None:
        raise SystemExit("Flower's FedAvg aggregated nothing")
    return arrays.to_numpy_ndarrays()[0]


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


def main() -> None:
    """Run both ways and print, or one of them in a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=64)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=("fold_in", "hold_all"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        before = read_memory("VmRSS")
        result = {"fold_in": fold_in, "hold_all": hold_all}[options.way](
            options.folder, options.updates
        )
        print(read_memory("VmHWM") - before, float(result[:1000].sum(dtype=np.float64)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_updates(Path(folder))
        figures = {way: run(way, folder, options.updates) for way in ("fold_in", "hold_all")}
    (ours, sum_ours), (theirs, sum_theirs) = figures["fold_in"], figures["hold_all"]
    if abs(sum_ours - sum_theirs) > 1e-3 * max(1.0, abs(sum_theirs)):
        raise SystemExit(f"the two means differ: {sum_ours} and {sum_theirs}")
    print(f"{options.updates} updates of {VALUES * 4 / 1e6:.0f} MB, the same weighted mean:\n")
    print("| aggregation | peak memory, MiB | ratio |\n|---|---|---|")
    print(f"| ours, folded in as they arrive | {ours:.0f} | {ours / theirs:.3f} |")
    print(f"| Flower's FedAvg | {theirs:.0f} | 1 |")


if __name__ == "__main__":
    main()
