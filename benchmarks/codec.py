"""Encodings of a real delta: bytes, error and time, beside float32 and bfloat16.

The delta is one hospital's first round of the demo: SmolLM2-135M in 4 bits, rank 8, 20 steps.
Bytes are those of the signed envelope. Times are the fastest of several, in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.federation import Federation, load_experiment
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, norm, subtract
from fedqlora.codec import decode_delta, encode_delta
from fedqlora.config import CodecConfig, validate
from fedqlora.envelope import sign

_T = TypeVar("_T")
WAYS = (
    {"update": "float32"},
    {"update": "bfloat16"},
    {"update": "int8"},
    {"update": "nf4"},
    {"update": "topk", "topk_fraction": 0.1},
    {"update": "topk", "topk_fraction": 0.01},
)


def make_delta(steps: int) -> Adapter:
    """One hospital's first round."""
    run = load_experiment(4, steps)
    federation = Federation.load(run, 3)
    return federation.train(run, "a", 1, federation.start(run)).delta


def count_bytes(tensors: pb.Tensors) -> int:
    """Size of the envelope that carries an update."""
    payload = pb.Update(delta=tensors, examples=160, tokens=4000).SerializeToString()
    key = Ed25519PrivateKey.generate()
    return len(sign(key, run="r", round_=1, site="a", kind=pb.UPDATE, issued=1, payload=payload))


def measure(work: Callable[[], _T], repeats: int) -> tuple[_T, float]:
    """A result and the shortest time that it took, in seconds."""
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        fastest = min(fastest, time.perf_counter() - started)
    return result, fastest


def main() -> None:
    """Print a row an encoding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    delta = make_delta(options.steps)
    spec = AdapterSpec.of(delta)
    rows: dict[str, tuple[int, float, float, float]] = {}
    for way in WAYS:
        codec = validate(CodecConfig, dict(way), "benchmark")
        tensors, encode_seconds = measure(partial(encode_delta, delta, codec), options.repeats)
        back, decode_seconds = measure(partial(decode_delta, tensors, spec), options.repeats)
        name = " ".join(str(value) for value in way.values())
        error = norm(subtract(delta, back)) / norm(delta)
        rows[name] = (count_bytes(tensors), error, encode_seconds, decode_seconds)
    whole = rows["float32"][0]
    _, _, encode_base, decode_base = rows["bfloat16"]
    print(f"a delta of {spec.parameters} values, {whole / 1e6:.2f} MB as float32\n")
    print("| encoding | smaller than float32 | relative error | encode, x bf16 | decode, x bf16 |")
    print("|---|---|---|---|---|")
    for name, (size, error, encode_seconds, decode_seconds) in rows.items():
        print(
            f"| {name} | {whole / size:.2f} | {error:.4f} | {encode_seconds / encode_base:.1f} "
            f"| {decode_seconds / decode_base:.1f} |"
        )
    print(f"\nbf16: {encode_base * 1e3:.0f} ms to encode, {decode_base * 1e3:.0f} ms to decode")


if __name__ == "__main__":
    main()
