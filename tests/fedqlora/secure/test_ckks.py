"""CKKS: what is decrypted is the exact sum, and who adds has nothing that decrypts."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fedqlora.errors import ConfigError, UpdateError
from fedqlora.secure import ckks


@pytest.fixture(scope="module")
def pair() -> ckks.KeyPair:
    return ckks.make_keys()


def draw(sites: int, count: int = 5000) -> np.ndarray:
    """Vectors of which some values are the largest of every site."""
    most = (ckks.LIMIT - 1) // sites
    values = np.random.default_rng(sites).integers(-most, most, (sites, count), endpoint=True)
    values[:, :10], values[:, 10:20] = most, -most
    return values.astype(np.int32)


@pytest.mark.parametrize("sites", [1, 3, 50])
def test_a_sum_is_exact_up_to_its_largest_values(pair: ckks.KeyPair, sites: int) -> None:
    vectors = draw(sites)
    total = ckks.CiphertextSum(2)
    for vector in vectors:
        total.add("a", ckks.encrypt(pair.public, vector))
    opened = ckks.decrypt(pair.secret, total.ciphertexts())
    np.testing.assert_array_equal(opened[:5000], vectors.astype(np.int64).sum(axis=0))
    assert not opened[5000:].any()


def test_noise_is_a_small_part_of_a_step_so_that_rounding_leaves_none(pair: ckks.KeyPair) -> None:
    """What would get out otherwise is the noise, of which the secret key can be worked out."""
    import tenseal

    vectors, total = draw(50, ckks.SLOTS), ckks.CiphertextSum(1)
    for vector in vectors:
        total.add("a", ckks.encrypt(pair.public, vector))
    context = tenseal.context_from(pair.secret)
    (sealed,) = total.ciphertexts()
    raw = np.array(tenseal.ckks_vector_from(context, sealed).decrypt())
    noise = np.abs(raw - vectors.astype(np.int64).sum(axis=0))
    assert 0 < noise.max() < 0.01


def test_neither_who_adds_nor_who_encrypts_can_decrypt(pair: ckks.KeyPair) -> None:
    import tenseal

    sealed = ckks.encrypt(pair.public, np.arange(9, dtype=np.int32))
    adder = ckks.CiphertextSum(1)
    adder.add("a", sealed)
    for context in (adder.context, tenseal.context_from(pair.public)):
        assert not context.is_private()
        with pytest.raises(ValueError, match="secret_key"):
            tenseal.ckks_vector_from(context, sealed[0]).decrypt()
    assert not adder.context.has_public_key()
    with pytest.raises(ValueError, match="secret_key"):
        ckks.decrypt(pair.public, sealed)
    # The same, once with the key that fits and once with another one.
    assert ckks.decrypt(pair.secret, sealed)[8] == 8
    with pytest.raises(UpdateError, match="does not decrypt to a sum"):
        ckks.decrypt(ckks.make_keys().secret, sealed)


def test_equal_vectors_are_unlike_ciphertexts(pair: ckks.KeyPair) -> None:
    zeros = np.zeros(3, dtype=np.int32)
    assert ckks.encrypt(pair.public, zeros) != ckks.encrypt(pair.public, zeros)


@pytest.mark.parametrize("bad", [b"", b"x" * 200, "cut", "scale", "short"])
def test_what_is_no_ciphertext_of_ours_is_refused_and_not_added(
    pair: ckks.KeyPair, bad: bytes | str
) -> None:
    import tenseal

    (good,) = ckks.encrypt(pair.public, np.ones(4, dtype=np.int32))
    context = tenseal.context_from(pair.public)
    ones = [1.0] * ckks.SLOTS
    made = {
        "cut": good[:-99],
        "scale": tenseal.ckks_vector(context, ones, 2.0**20).serialize(),
        "short": tenseal.ckks_vector(context, [1.0] * 7, 2.0**26).serialize(),
    }
    total = ckks.CiphertextSum(1)
    total.add("a", [good])
    with pytest.raises(UpdateError, match="ciphertext are none"):
        total.add("b", [made[bad] if isinstance(bad, str) else bad])
    with pytest.raises(UpdateError, match="has 2 ciphertexts, not 1"):
        total.add("b", [good, good])
    assert ckks.decrypt(pair.secret, total.ciphertexts())[:5].tolist() == [1, 1, 1, 1, 0]


def test_without_tenseal_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ckks.check_installed()
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match="install fedqlora with the extra `he`") as refused:
        ckks.check_installed()
    assert "\n" not in str(refused.value)
