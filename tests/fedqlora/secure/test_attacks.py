"""What a coordinator that holds all messages can do to secure aggregation: nothing.

Each attack is shown to work against a site that leaves out the one check that stops it, then to be
refused by the honest site, or to give nothing. `values_of("a")` is what the attacker is after.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group, derive_mask_seed, derive_seal_key, sign_round_key
from fedqlora.secure.masks import Ring, add_mask, from_bytes, remove_mask, to_bytes
from fedqlora.secure.participant import Participant
from fedqlora.secure.sealing import release
from fedqlora.secure.shamir import SHARE_BYTES, Combiner
from fedqlora.secure.state import Secrets
from tests.fedqlora.secure.house import LENGTH, House, signing_key, total_of, values_of


def refused(caught: pytest.ExceptionInfo[SecureAggregationError]) -> str:
    return caught.value.rule


def private_of(house: House, name: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(house.disks[name].private)


def give(
    house: House, name: str, group: Group, alive: Sequence[str], masked: Mapping[str, pb.Masked]
) -> dict[tuple[str, str], bytes]:
    """What a site would give for a list of survivors if it checked nothing."""
    sealed = {sender: masked[sender].sealed[name] for sender in alive}
    shares = release(name, private_of(house, name), group, alive, sealed)
    return {(one.site, one.peer): one.value for one in shares}


def secret_from(
    group: Group, given: Mapping[str, Mapping[tuple[str, str], bytes]], secret: tuple[str, str]
) -> bytes | None:
    """A secret, if a threshold of sites gave a share of it."""
    shares = {group.sites.index(n) + 1: own[secret] for n, own in given.items() if secret in own}
    if len(shares) < group.threshold:
        return None
    return Combiner(sorted(shares)[: group.threshold]).combine(shares)


def strip(vector: Ring, owner: str, seeds: Mapping[str, bytes]) -> Ring:
    """A site's vector without these masks of it, by peer ("" is its own)."""
    bare = vector.copy()
    for peer, seed in seeds.items():
        (remove_mask if not peer or owner < peer else add_mask)(bare, seed)
    return bare


def play_all_others(house: House, keys: Mapping[str, X25519PrivateKey], masked: pb.Masked) -> Ring:
    """Site a's update, by whoever has the round keys of all the others."""
    publics = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    own = house.keys("a")[0].public
    group = Group(run=house.run, round=house.round, keys={**publics, "a": own})
    seeds = {name: derive_mask_seed(key, name, "a", group) for name, key in keys.items()}
    shares = {}
    for name, key in keys.items():
        seal = derive_seal_key(key, name, "a", group, sending=False)
        opened = AESGCM(seal).decrypt(bytes(12), masked.sealed[name], None)
        shares[group.sites.index(name) + 1] = opened[:SHARE_BYTES]
    numbers = sorted(shares)[: group.threshold]
    if len(numbers) == group.threshold:
        seeds[""] = Combiner(numbers).combine(shares)
    return strip(from_bytes(masked.values), "a", seeds)


FAKE = {name: X25519PrivateKey.generate() for name in "bcdefg"}


def forged(house: House, names: str, signer: str | None = None) -> list[pb.RoundKey]:
    """Round keys that the coordinator has made for other sites, signed by whom it can."""
    return [
        sign_round_key(
            signing_key(signer or f"not {name}"),
            run=house.run,
            round_=house.round,
            site=name,
            public=FAKE[name].public_key().public_bytes_raw(),
        )
        for name in names
    ]


def trusting(house: House, name: str, peers: Mapping[str, str]) -> Participant:
    """A site that takes other signing keys for its peers' (as from a roster alone)."""
    keys = {peer: signing_key(signer).public_key() for peer, signer in peers.items()}
    return Participant(name, signing_key(name), keys, house.least, house.disks[name])


def test_a_swapped_key_reads_the_update_unless_keys_are_pinned() -> None:
    house = House("abcdefg")
    keys = [*house.keys("a"), *forged(house, "bcdefg")]
    # Without pinning: the keys' signer is whoever the coordinator names.
    site = trusting(house, "a", {name: f"not {name}" for name in "bcdefg"})
    vector = values_of("a")
    sealed = site.mask(site.join(keys), vector)
    masked = pb.Masked(values=vector.tobytes(), sealed=sealed)
    # Six of the seven are the coordinator's: enough for a's own mask too.
    np.testing.assert_array_equal(play_all_others(house, FAKE, masked), values_of("a"))
    with pytest.raises(SecureAggregationError, match="not signed by that site") as caught:
        house.site("a").join(keys)
    assert refused(caught) == "secure_aggregation.keys"


def test_one_swapped_key_gives_nothing_even_where_it_is_taken() -> None:
    """The one mask that the coordinator knows is one of many, and no sum comes out."""
    house = House("abcd")
    keys = [*house.keys("acd"), *forged(house, "b")]
    site = trusting(house, "a", {"b": "not b", "c": "c", "d": "d"})
    vector = values_of("a")
    group = site.join(keys)
    site.mask(group, vector)
    seed = derive_mask_seed(FAKE["b"], "b", "a", group)
    assert not np.array_equal(strip(vector, "a", {"b": seed}), values_of("a"))


def test_a_key_of_another_round_or_run_or_site_is_refused() -> None:
    house, other_round = House("abc"), House("abc", round=2)
    other_run = House("abc", run="q")
    named_c = pb.RoundKey()
    named_c.CopyFrom(house.keys("b")[0])
    named_c.site = "c"
    for keys in (
        [*house.keys("ac"), *other_round.keys("b")],
        [*house.keys("ac"), *other_run.keys("b")],
        [*house.keys("ab"), named_c],
        [*other_round.keys("a"), *house.keys("bc")],
        [*house.again().keys("a"), *house.keys("bc"), *house.keys("b")],
        house.keys("bc"),
    ):
        with pytest.raises(SecureAggregationError) as caught:
            house.site("a").join(keys)
        assert refused(caught) == "secure_aggregation.keys"


def test_a_replayed_key_of_a_peer_only_spoils_the_sum() -> None:
    """A site cannot know which of a peer's keys for this round is the newest."""
    house = House("abcd")
    old = house.keys("b")
    house = house.again()
    masked = house.mask("a", [*house.keys("acd"), *old])
    others = {name: private_of(house, name) for name in "bcd"}
    with pytest.raises(InvalidTag):
        play_all_others(house, others, masked)


def test_a_round_done_again_with_one_site_less_gives_that_site_unless_it_is_refused() -> None:
    house = House("abcdefg")
    first = house.finish(house.collect())
    kept = dict(house.disks)
    # Without the memory of what was opened: training again gives the same updates.
    house.disks = {}
    for name in house.names:
        house.disks[name] = Secrets.make(house.run, house.round)
    second = house.finish(house.collect("a"))
    np.testing.assert_array_equal(first - second, values_of("a"))
    house.disks = kept
    house = house.again()
    collector = house.collect("a")
    with pytest.raises(SecureAggregationError, match="was opened before as a sum of 7") as caught:
        house.confirm("b", collector.alive)
    assert refused(caught) == "secure_aggregation.replay"
    # A round cut off after it was opened can be done again by the same sites.
    house = house.again()
    np.testing.assert_array_equal(house.finish(house.collect()), first)


class LowGroup(Group):
    """A group whose secrets three of seven shares open."""

    threshold = 3  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [LowGroup, Group])
def test_two_lists_of_survivors_read_an_update_if_the_threshold_is_low(kind: type[Group]) -> None:
    """To four of seven a is alive, to three it is lost, and nobody compares the lists."""
    house = House("abcdefg")
    keys = house.keys()
    group = kind(run="r", round=1, keys=house.group().keys)
    masked = {}
    for name in house.names:
        site, vector = house.site(name), values_of(name)
        assert site.join(keys).keys == group.keys
        sealed = site.mask(group, vector)
        masked[name] = pb.Masked(values=to_bytes(vector), sealed=sealed)
    lists = {n: "abcdefg" if n in "abcd" else "bcdefg" for n in house.names}
    given = {n: give(house, n, group, lists[n], masked) for n in house.names}
    seeds = {"": secret_from(group, given, ("a", ""))}
    seeds |= {peer: secret_from(group, given, (peer, "a")) for peer in "bcdefg"}
    if kind is Group:
        assert set(seeds.values()) == {None}, "of seven five have to give one of the two"
        return
    bare = strip(from_bytes(masked["a"].values), "a", seeds)  # type: ignore[arg-type]
    np.testing.assert_array_equal(bare, values_of("a"))


def test_with_three_accomplices_unlike_lists_open_a_sum_of_two_unless_they_are_compared() -> None:
    """The threshold alone keeps both secrets of one site apart; the comparison keeps sums large."""
    house = House("abcdefghij")
    group, accomplices, honest = house.group(), "hij", "abcdefg"
    assert group.threshold == 7
    masked = {name: house.mask(name) for name in house.names}
    # a and b are to be left; c to g are each called lost to four of the seven honest sites, so
    # that with the three accomplices seven give what takes the masks in common with them off.
    lost = {"a": "cde", "b": "fg", "c": "def", "d": "efg", "e": "fgc", "f": "gcd", "g": "cde"}
    assert all("".join(lost.values()).count(victim) == 4 for victim in "cdefg")
    lists = {n: [one for one in house.names if one not in lost[n]] for n in honest}
    assert all(len(alive) >= group.threshold and n in alive for n, alive in lists.items())
    given = {n: give(house, n, group, lists[n], masked) for n in honest}
    for name in accomplices:
        for alive in lists.values():
            given.setdefault(name, {}).update(give(house, name, group, alive, masked))
    total = from_bytes(masked["a"].values) + from_bytes(masked["b"].values)
    for owner, peer in itertools.product("ab", ["", *"cdefg"]):
        seed = secret_from(group, given, (owner, peer))
        assert seed is not None, (owner, peer)
        (remove_mask if not peer or owner < peer else add_mask)(total, seed)
    for owner, name in itertools.product("ab", accomplices):
        seed = derive_mask_seed(private_of(house, name), name, owner, group)
        (remove_mask if owner < name else add_mask)(total, seed)
    np.testing.assert_array_equal(total, total_of("ab"))

    # Honest sites: nobody gives anything before seven have signed the very list that it has.
    house = House("abcdefghij")
    house.collect()
    signatures = {n: house.confirm(n, lists[n]) for n in honest}
    for name in honest:
        statement = Group(run="r", round=1, keys=house.disks[name].keys).alive_statement(
            tuple(lists[name])
        )
        own = {n: signing_key(n).sign(statement) for n in accomplices}
        same = {n: signatures[n] for n in honest if lists[n] == lists[name]}
        with pytest.raises(SecureAggregationError, match="asks for 7") as caught:
            house.unmask(name, {**own, **same}, {})
        assert refused(caught) == "secure_aggregation.signatures"
        with pytest.raises(SecureAggregationError, match="shown different lists"):
            house.unmask(name, {**own, **signatures}, {})


def test_a_second_unmasking_for_another_list_gives_both_secrets_unless_it_is_refused() -> None:
    house = House("abcd")
    group = house.group()
    masked = {name: house.mask(name) for name in house.names}
    # Without the rule: once with a alive, once with a lost.
    given: dict[str, dict[tuple[str, str], bytes]] = {}
    for alive in ("abcd", "bcd"):
        for name in "bcd":
            given.setdefault(name, {}).update(give(house, name, group, alive, masked))
    seeds = {"": secret_from(group, given, ("a", ""))}
    seeds |= {peer: secret_from(group, given, (peer, "a")) for peer in "bcd"}
    assert None not in seeds.values()
    bare = strip(from_bytes(masked["a"].values), "a", seeds)  # type: ignore[arg-type]
    np.testing.assert_array_equal(bare, values_of("a"))

    house = House("abcd")
    keys, collector = house.keys(), house.collect()
    house.finish(collector)
    for step in (
        lambda: house.confirm("b", "bcd"),
        lambda: house.unmask("b", {}, collector.sealed_for("b")),
        lambda: house.mask("b", keys),
    ):
        with pytest.raises(SecureAggregationError, match="already done this step") as caught:
            step()
        assert refused(caught) == "secure_aggregation.once"
    house = House("abcd")
    house.collect()
    house.confirm("b", "abcd")
    with pytest.raises(SecureAggregationError, match="already done this step"):
        house.confirm("b", "bcd")


def test_a_living_site_that_is_called_lost_keeps_its_own_mask() -> None:
    """The others cannot know; what they give would bare it if it had no mask of its own."""
    house = House("abcdefg")
    group = house.group()
    masked = {name: house.mask(name) for name in house.names}
    collector = Collector(group, LENGTH)
    for name in "bcdefg":
        collector.add(name, masked[name])
    alive = collector.alive
    signatures = {name: house.confirm(name, alive) for name in alive}
    given = {}
    for name in alive:
        shares = house.unmask(name, signatures, collector.sealed_for(name))
        collector.take(name, shares)
        given[name] = {(one.site, one.peer): one.value for one in shares}
    np.testing.assert_array_equal(collector.open(), total_of("bcdefg"))
    common = {peer: secret_from(group, given, (peer, "a")) for peer in "bcdefg"}
    assert None not in common.values(), "all masks that a has in common with others are known"
    left = strip(from_bytes(masked["a"].values), "a", common)  # type: ignore[arg-type]
    assert not np.array_equal(left, values_of("a"))
    # What is left is a's own mask, of which nobody gave a share.
    assert not any(("a", "") in own for own in given.values())
    without = values_of("a")
    for peer, seed in common.items():
        (add_mask if peer > "a" else remove_mask)(without, seed)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        strip(without, "a", common),
        values_of("a"),  # type: ignore[arg-type]
    )
    # And a itself signs no list that it is not on.
    with pytest.raises(SecureAggregationError) as caught:
        house.confirm("a", alive)
    assert refused(caught) == "secure_aggregation.survivors"


def test_a_sum_of_two_tells_each_the_other_unless_it_is_refused() -> None:
    house = House("ab", least=2)
    total = house.finish(house.collect())
    np.testing.assert_array_equal(total - values_of("b"), values_of("a"))
    house = House("ab", least=3)
    with pytest.raises(SecureAggregationError, match="a sum of 2 sites") as caught:
        house.site("a").join(house.keys())
    assert refused(caught) == "secure_aggregation.sites"
    # Nor from three by losing one, nor from five below what the site asks for.
    house = House("abc")
    house.collect()
    with pytest.raises(SecureAggregationError, match="a sum of 2 of 3 sites") as caught:
        house.confirm("a", "ab")
    assert refused(caught) == "secure_aggregation.survivors"
    house = House("abcde", least=5)
    house.collect()
    with pytest.raises(SecureAggregationError, match="one of at least 5"):
        house.confirm("a", "abcd")


def test_sites_that_the_coordinator_plays_count_only_if_the_hospital_has_pinned_them() -> None:
    house = House("abcdefg")
    played = {name: private_of(house, name) for name in "bcdefg"}
    masked = house.mask("a")
    np.testing.assert_array_equal(play_all_others(house, played, masked), values_of("a"))

    house = House("abcdefg")
    known = {name: signing_key(name).public_key() for name in "bc"}
    site = Participant("a", signing_key("a"), known, 3, house.disks["a"])
    with pytest.raises(SecureAggregationError, match="pins no key of site d") as caught:
        site.join(house.keys())
    assert refused(caught) == "secure_aggregation.peers"
    assert site.join(house.keys("abc")).sites == ("a", "b", "c")


def test_sites_that_are_shown_different_keys_derive_masks_that_do_not_cancel() -> None:
    """A coordinator cannot put a together with some sites for its masks and others for its sum."""
    house = House("abcd")
    collector = Collector(house.group(), LENGTH)
    keys = house.keys()
    for name in "bcd":
        collector.add(name, house.mask(name, keys))
    vector = values_of("a")
    site = house.site("a")
    sealed = site.mask(site.join(house.keys("abc")), vector)
    masked = pb.Masked(values=vector.tobytes(), sealed={**sealed, "d": b""})
    collector.add("a", masked)
    signatures: dict[str, bytes] = {n: house.confirm(n, "abcd") for n in "bcd"}
    with pytest.raises(SecureAggregationError, match="that site a has sealed"):
        house.unmask("b", signatures, collector.sealed_for("b"))
