"""Shamir's sharing: a threshold gives the secret back, and one share less says nothing of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqlora.secure.shamir import PRIME, SHARE_BYTES, Combiner, split


@settings(max_examples=30, deadline=None)
@given(
    secret=st.one_of(st.binary(min_size=16, max_size=16), st.just(b"\xff" * 16)),
    sizes=st.integers(2, 12).flatmap(lambda n: st.tuples(st.integers(2, n), st.just(n))),
    data=st.data(),
)
def test_any_threshold_of_shares_gives_the_secret_back(
    secret: bytes, sizes: tuple[int, int], data: st.DataObject
) -> None:
    threshold, count = sizes
    shares = dict(enumerate(split(secret, threshold, count), start=1))
    numbers = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    assert Combiner(numbers).combine(shares) == secret
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}


def test_one_share_less_fits_every_secret() -> None:
    """Two of three shares: for each other secret there is one third share that gives it."""
    shares = dict(enumerate(split(b"s" * 16, 3, 3), start=1))
    for other in (bytes(16), b"\xff" * 16, b"t" * 16):
        # f(0) = 3 f(1) - 3 f(2) + f(3) for a polynomial of degree two.
        first, second = (int.from_bytes(shares[number], "big") for number in (1, 2))
        third = (int.from_bytes(other, "big") - 3 * first + 3 * second) % PRIME
        made = {**shares, 3: third.to_bytes(SHARE_BYTES, "big")}
        assert Combiner([1, 2, 3]).combine(made) == other


def test_shares_of_one_secret_are_made_anew_each_time() -> None:
    seen = {share for _ in range(20) for share in split(b"s" * 16, 2, 3)}
    assert len(seen) == 60


def test_wrong_shares_rarely_pass_for_a_secret() -> None:
    shares = dict(enumerate(split(b"s" * 16, 3, 4), start=1))
    shares[2] = bytes(SHARE_BYTES)
    results = []
    for numbers in itertools.permutations(range(1, 5), 3):
        try:
            results.append(Combiner(numbers).combine(shares))
        except ValueError:
            results.append(b"")
    with_it = [one for one in results if one != b"s" * 16]
    assert len(with_it) == 18, "every set with the wrong share, and no other"


@pytest.mark.parametrize(("size", "threshold", "count"), [(16, 1, 3), (16, 4, 3), (15, 2, 3)])
def test_what_cannot_be_shared_is_refused(size: int, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        split(bytes(size), threshold, count)


def test_the_prime_is_one_and_holds_every_secret() -> None:
    assert PRIME > 2**128
    # Miller and Rabin, twelve bases: PRIME - 1 is odd times a power of two.
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        chain = [pow(base, odd * 2**step, PRIME) for step in range(twos)]
        assert chain[0] == 1 or PRIME - 1 in chain
