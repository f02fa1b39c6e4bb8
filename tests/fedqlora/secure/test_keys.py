"""Round keys: who signed one, and what secrets that two sites derive depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedqlora.errors import SecureAggregationError
from fedqlora.secure.keys import (
    Group,
    derive_mask_seed,
    derive_seal_key,
    sign_round_key,
    verify_round_key,
)
from tests.fedqlora.secure.house import signing_key

PRIVATE = {name: X25519PrivateKey.from_private_bytes(name.encode() * 32) for name in "abc"}
GROUP = Group(
    run="r",
    round=1,
    keys={name: key.public_key().public_bytes_raw() for name, key in PRIVATE.items()},
)


def test_a_round_key_counts_for_its_run_round_and_site_only() -> None:
    key = signing_key("a")
    signed = sign_round_key(key, run="r", round_=1, site="a", public=GROUP.keys["a"])
    assert verify_round_key(signed, key.public_key(), run="r", round_=1) == GROUP.keys["a"]
    for run, round_, site, public, signer in (
        ("q", 1, "a", GROUP.keys["a"], "a"),
        ("r", 2, "a", GROUP.keys["a"], "a"),
        ("r", 1, "b", GROUP.keys["a"], "a"),
        ("r", 1, "a", GROUP.keys["b"], "a"),
        ("r", 1, "a", GROUP.keys["a"], "b"),
    ):
        signed.site, signed.public = site, public
        with pytest.raises(SecureAggregationError, match="not signed by that site"):
            verify_round_key(signed, signing_key(signer).public_key(), run=run, round_=round_)


def test_two_sites_derive_the_same_secrets_and_other_sites_others() -> None:
    assert derive_mask_seed(PRIVATE["a"], "a", "b", GROUP) == derive_mask_seed(
        PRIVATE["b"], "b", "a", GROUP
    )
    assert derive_seal_key(PRIVATE["a"], "a", "b", GROUP, sending=True) == derive_seal_key(
        PRIVATE["b"], "b", "a", GROUP, sending=False
    )
    assert derive_mask_seed(PRIVATE["a"], "a", "b", GROUP) != derive_mask_seed(
        PRIVATE["a"], "a", "c", GROUP
    )


def test_secrets_depend_on_direction_run_round_and_everybodys_keys() -> None:
    others = (
        replace(GROUP, run="q"),
        replace(GROUP, round=2),
        replace(GROUP, keys={name: key for name, key in GROUP.keys.items() if name != "c"}),
        replace(GROUP, keys={**GROUP.keys, "c": bytes(31) + b"\x09"}),
    )
    seeds = {derive_mask_seed(PRIVATE["a"], "a", "b", group) for group in (GROUP, *others)}
    seals = {
        derive_seal_key(PRIVATE["a"], "a", "b", group, sending=sending)
        for group in (GROUP, *others)
        for sending in (True, False)
    }
    assert (len(seeds), len(seals)) == (5, 10)


@pytest.mark.parametrize("key", [bytes(32), b"short"])
def test_a_key_that_gives_no_secret_is_refused(key: bytes) -> None:
    """An all-zero point would make the secret zero, for everybody to know."""
    group = replace(GROUP, keys={**GROUP.keys, "b": key})
    with pytest.raises(SecureAggregationError, match="site b is no X25519 key"):
        derive_mask_seed(PRIVATE["a"], "a", "b", group)
