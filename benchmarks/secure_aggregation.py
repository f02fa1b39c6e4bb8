"""Secure aggregation of the demo's adapter: its time beside a round's training, and its bytes.

The delta is one hospital's round of the demo: SmolLM2-135M in 4 bits, rank 8. For each number of
sites one site's whole part is timed (round key, fixed point, masks, shares, confirmation,
unmasking) and the centre's (sum, and masks off) with nobody lost and with as many as may be. Bytes
are those of all signed envelopes that a site sends in a round, against the float32 update's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from benchmarks.federation import Federation, load_experiment
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import encode
from fedqlora.envelope import sign
from fedqlora.privacy.noise import SecureNoise
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import to_bytes
from fedqlora.secure.participant import Participant
from fedqlora.secure.state import Secrets
from fedqlora.secure.vector import Counts, Scale, pack, unpack, vector_length


@dataclass
class Clock:
    """Seconds spent in each of some kinds of work."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Add the time of a block."""
        started = time.perf_counter()
        yield
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - started


def count_bytes(message: Message, kind: pb.Kind) -> int:
    """Size of the envelope that carries a reply."""
    key = Ed25519PrivateKey.generate()
    payload = message.SerializeToString()
    return len(sign(key, run="r", round_=1, site="s00", kind=kind, issued=1, payload=payload))


def run_round(delta: Adapter, count: int, lost: int) -> tuple[Clock, int]:
    """One round; the clock has each site's time by name and the centre's, the bytes are of one."""
    spec, clock = AdapterSpec.of(delta), Clock()
    names = [f"s{number:02}" for number in range(count)]
    signers = {name: Ed25519PrivateKey.generate() for name in names}
    publics = {name: key.public_key() for name, key in signers.items()}
    sites = {
        name: Participant(
            name,
            signers[name],
            {other: key for other, key in publics.items() if other != name},
            3,
            Secrets.make("r", 1),
        )
        for name in names
    }
    keys = []
    for name, site in sites.items():
        with clock.of(name):
            keys.append(site.advertise())
    group = Group(run="r", round=1, keys={one.site: one.public for one in keys})
    scale = Scale(sites=count, most_weight=240, largest=1.0)
    collector = Collector(group, vector_length(spec))
    alive = names[: count - lost]
    size = 0
    for name in alive:
        with clock.of(name):
            joined = sites[name].join(keys)
            vector = pack(delta, Counts(weight=240), scale, SecureNoise().uniform)
            sealed = sites[name].mask(joined, vector)
            update = pb.Update(masked=pb.Masked(values=to_bytes(vector), sealed=sealed))
        size = count_bytes(update, pb.UPDATE)
        with clock.of("centre"):
            collector.add(name, update.masked)
    signatures = {}
    for name in alive:
        with clock.of(name):
            signatures[name] = sites[name].confirm(alive)
    size += count_bytes(pb.Confirmation(signature=signatures[alive[0]]), pb.CONFIRMATION)
    for name in alive:
        with clock.of(name):
            shares = sites[name].unmask(signatures, collector.sealed_for(name))
        with clock.of("centre"):
            collector.take(name, shares)
    unmasking = pb.Unmasking(shares=shares, round_key=keys[0])
    with clock.of("centre"):
        unpack(collector.open(), spec, scale, len(alive))
    return clock, size + count_bytes(unmasking, pb.UNMASKING)


def measure(delta: Adapter, counts: Sequence[int], training_seconds: float) -> Iterator[str]:
    """A row for each number of sites."""
    plain = count_bytes(
        pb.Update(delta=encode(delta, "float32"), examples=240, tokens=4000), pb.UPDATE
    )
    for count in counts:
        for lost in dict.fromkeys((0, count - (2 * count // 3 + 1))):
            clock, size = run_round(delta, count, lost)
            centre = clock.spent.pop("centre")
            site = max(clock.spent.values())
            yield (
                f"| {count} | {lost} | {site * 1e3:.0f} ms | {100 * site / training_seconds:.2f} % "
                f"| {centre:.2f} s | {size / plain:.4f} |"
            )


def main() -> None:
    """Print a row for each number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of a demo round")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 50])
    options = parser.parse_args()
    run = load_experiment(4, options.steps)
    federation = Federation.load(run, 3)
    start = federation.start(run)
    started = time.perf_counter()
    delta = federation.train(run, "a", 1, start).delta
    seconds = time.perf_counter() - started
    print(
        f"{AdapterSpec.of(delta).parameters} values; {options.steps} steps took {seconds:.1f} s\n"
    )
    print("| sites | lost | a site's time | of its training | the centre | bytes up, x float32 |")
    print("|---|---|---|---|---|---|")
    for row in measure(delta, options.sites, seconds):
        print(row)


if __name__ == "__main__":
    main()
