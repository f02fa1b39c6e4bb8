"""Homomorphic encryption beside secure aggregation, for the same values: bytes and seconds.

The values are those of B in the demo's adapter (SmolLM2-135M, rank 8) or any number; they are
drawn, as neither way's cost depends on them. For each number of sites one site's whole part is
timed, the key site's on top of it, and the centre's. Bytes are those of all signed envelopes of
one site in a round, up and down beside the adapter itself, against the float32 update's.
"""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.secure_aggregation import Clock, count_bytes, run_round
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import encode
from fedqlora.privacy.noise import SecureNoise
from fedqlora.secure import ckks
from fedqlora.secure.encryption import (
    SEED_BYTES,
    add_checksums,
    checksum,
    seal_checksum,
    unwrap,
    wrap,
)
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import Ring
from fedqlora.secure.vector import Counts, Scale, pack, unpack, vector_length

DEMO_VALUES = 1_244_160
"""Values of B in the demo's adapter."""


def run_encrypted(delta: Adapter, count: int) -> tuple[Clock, int, int]:
    """One encrypted round.

    Returns:
        Seconds of `site` (one of them), `key site` (on top) and `centre`; bytes up of a site and of
        the key site.
    """
    spec, clock = AdapterSpec.of(delta), Clock()
    names = [f"s{number:02}" for number in range(count)]
    holder = names[0]
    private = {name: X25519PrivateKey.generate() for name in names}
    keys = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    group = Group(run="r", round=1, keys=keys)
    scale = Scale(sites=count, most_weight=240, largest=1.0)
    with clock.of("key site"):
        pair, own_seed = ckks.make_keys(), secrets.token_bytes(SEED_BYTES)
        wrapped = wrap(holder, private[holder], group, pair.public, own_seed)
    total = ckks.CiphertextSum(-(-vector_length(spec) // ckks.SLOTS))
    checksums = {}
    site, size = Clock(), 0
    for name in names:
        # All do the same, so one site encrypts and the rest send its ciphertexts.
        if name in (holder, names[1]):
            with (site if name == names[1] else Clock()).of("site"):
                public, seed = unwrap(name, private[name], group, holder, wrapped)
                vector = pack(delta, Counts(weight=240), scale, SecureNoise().uniform)
                values = vector.view(np.int32)
                ciphertexts = ckks.encrypt(public, values)
                own = checksum(values, seed)
        checksums[name] = seal_checksum(name, private[name], group, holder, own)
        encrypted = pb.Encrypted(ciphertexts=ciphertexts, checksum=checksums[name])
        size = count_bytes(pb.Update(encrypted=encrypted), pb.UPDATE)
        with clock.of("centre"):
            total.add(name, ciphertexts)
    with clock.of("centre"):
        summed = total.ciphertexts()
    with clock.of("key site"):
        opened = ckks.decrypt(pair.secret, summed)
        expected = add_checksums(holder, private[holder], group, names, checksums)
        if not np.array_equal(checksum(opened, own_seed), expected):
            raise SystemExit("the checksums do not add up")
        sums: Ring = opened.astype(np.int32).view(np.uint32)
    with clock.of("centre"):
        mean = unpack(sums, spec, scale, count).mean
    if not all(np.allclose(mean[name], delta[name], atol=1e-5) for name in delta):
        raise SystemExit("the mean of the encrypted updates is not that of the plain ones")
    clock.spent |= site.spent
    return clock, size, count_bytes(wrapped, pb.WRAPPED_KEY) + 4 * opened.size


def measure(values: int, counts: Sequence[int]) -> Iterator[str]:
    """Two rows for each number of sites."""
    draw = np.random.default_rng(1)
    delta = {"m.lora_B.weight": draw.uniform(-0.01, 0.01, (values, 1)).astype(np.float32)}
    plain = count_bytes(pb.Update(delta=encode(delta, "float32"), examples=240), pb.UPDATE)
    for count in counts:
        masked, size = run_round(delta, count, 0)
        centre = masked.spent.pop("centre")
        yield (
            f"| {count} | secure aggregation | {size / 1e6:.1f} MB | {size / plain:.2f} | "
            f"{max(masked.spent.values()):.2f} s | - | {centre:.2f} s |"
        )
        clock, size, more = run_encrypted(delta, count)
        yield (
            f"| {count} | homomorphic encryption | {size / 1e6:.1f} MB | {size / plain:.2f} | "
            f"{clock.spent['site']:.2f} s | {clock.spent['key site']:.2f} s and "
            f"{more / 1e6:.1f} MB | {clock.spent['centre']:.2f} s |"
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=DEMO_VALUES, help="in an update")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    options = parser.parse_args()
    print(f"{options.values} values\n")
    print("| sites | way | bytes up of a site | x float32 | a site | key site, on top | centre |")
    print("|---|---|---|---|---|---|---|")
    for row in measure(options.values, options.sites):
        print(row)


if __name__ == "__main__":
    main()
