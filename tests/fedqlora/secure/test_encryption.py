"""Wrapped keys and checksums: for one site, run and round, and for the very sum."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import EncryptionError
from fedqlora.secure.encryption import (
    SEED_BYTES,
    add_checksums,
    checksum,
    seal_checksum,
    unwrap,
    wrap,
)
from fedqlora.secure.keys import Group

PRIVATE = {name: X25519PrivateKey.generate() for name in "abc"}
GROUP = Group(
    run="r",
    round=1,
    keys={name: key.public_key().public_bytes_raw() for name, key in PRIVATE.items()},
)
SEED = secrets.token_bytes(SEED_BYTES)


def test_every_site_of_the_round_opens_the_key_and_nobody_else() -> None:
    wrapped = wrap("a", PRIVATE["a"], GROUP, b"public", SEED)
    for site in "abc":
        assert unwrap(site, PRIVATE[site], GROUP, "a", wrapped) == (b"public", SEED)
    assert b"public" not in wrapped.SerializeToString()
    stranger = X25519PrivateKey.generate()
    with pytest.raises(EncryptionError, match="was not wrapped by site a for site b"):
        unwrap("b", stranger, GROUP, "a", wrapped)


Change = Callable[[pb.WrappedKey], tuple[Group, str]]


def _other_key(wrapped: pb.WrappedKey) -> tuple[Group, str]:
    """The coordinator's own key, wrapped as well as it can."""
    mine = X25519PrivateKey.generate()
    wrapped.CopyFrom(wrap("a", mine, GROUP, b"mine", SEED))
    return GROUP, "a"


def _another_for_it(wrapped: pb.WrappedKey) -> tuple[Group, str]:
    wrapped.wrapped["b"] = wrapped.wrapped["c"]
    return GROUP, "a"


def _cut(wrapped: pb.WrappedKey) -> tuple[Group, str]:
    wrapped.sealed = wrapped.sealed[:5]
    return GROUP, "a"


@pytest.mark.parametrize(
    "change",
    [
        _other_key,
        _another_for_it,
        _cut,
        lambda _: (GROUP, "c"),
        lambda _: (replace(GROUP, round=2), "a"),
        lambda _: (replace(GROUP, run="s"), "a"),
        lambda _: (replace(GROUP, keys={**GROUP.keys, "d": bytes(32)}), "a"),
    ],
)
def test_a_key_of_another_site_run_round_or_group_does_not_open(change: Change) -> None:
    wrapped = wrap("a", PRIVATE["a"], GROUP, b"public", SEED)
    group, holder = change(wrapped)
    with pytest.raises(EncryptionError) as refused:
        unwrap("b", PRIVATE["b"], group, holder, wrapped)
    assert refused.value.rule == "homomorphic_encryption.key"


def vectors() -> dict[str, np.ndarray]:
    # More values than are worked on at a time, with the largest of both signs.
    rng = np.random.default_rng(1)
    made = {name: rng.integers(-(2**29), 2**29, 2**16 + 77, dtype=np.int32) for name in "abc"}
    made["a"][:2] = (2**29, -(2**29))
    return made


def sealed(made: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {
        name: seal_checksum(name, PRIVATE[name], GROUP, "a", checksum(value, SEED))
        for name, value in made.items()
    }


def test_checksums_add_up_to_that_of_the_sum_and_to_no_other() -> None:
    made = vectors()
    expected = add_checksums("a", PRIVATE["a"], GROUP, "abc", sealed(made))
    total = sum(value.astype(np.int64) for value in made.values())
    filled = np.concatenate([total, np.zeros(300, dtype=np.int64)])
    np.testing.assert_array_equal(checksum(filled, SEED), expected)
    for place in (0, 2**16, total.size - 1):
        for off in (1, -1, 2**31):
            wrong = total.copy()
            wrong[place] += off
            assert not (checksum(wrong, SEED) == expected).all()
    for wrong in (made["b"].astype(np.int64), 3 * made["b"].astype(np.int64), total[::-1]):
        assert not (checksum(wrong, SEED) == expected).any()


def test_a_checksum_of_another_site_or_round_does_not_count() -> None:
    good = sealed(vectors())
    group = replace(GROUP, round=2)
    old = seal_checksum("b", PRIVATE["b"], group, "a", checksum(np.ones(3, dtype=np.int64), SEED))
    for bad in ({**good, "b": good["c"]}, {**good, "b": old}, {"a": good["a"]}, {**good, "b": b""}):
        with pytest.raises(EncryptionError, match="checksum of site b is missing or not its own"):
            add_checksums("a", PRIVATE["a"], GROUP, "abc", bad)
