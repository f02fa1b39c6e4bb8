"""One round of secure aggregation: the sum is right whoever is lost, and nothing else opens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError, UpdateError
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import from_bytes
from tests.fedqlora.secure.house import LENGTH, House, signing_key, total_of, values_of

TEN = "abcdefghij"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", ["lost", "silent", "gone"])
def test_the_sum_of_ten_is_right_with_up_to_three_lost_at_any_stage(count: int, stage: str) -> None:
    house = House(TEN)
    missing = TEN[1 : 1 + count]
    collector = house.collect(missing if stage == "lost" else "")
    others = {} if stage == "lost" else {stage: missing}
    survivors = set(TEN) - set(missing) if stage == "lost" else set(TEN)
    np.testing.assert_array_equal(house.finish(collector, **others), total_of(survivors))


def test_the_sum_is_right_with_one_lost_at_each_stage() -> None:
    house = House(TEN)
    total = house.finish(house.collect("c"), silent="f", gone="j")
    np.testing.assert_array_equal(total, total_of(set(TEN) - {"c"}))


@pytest.mark.parametrize("names", ["abc", "abcd", "abcde"])
def test_small_rounds_lose_as_many_as_their_threshold_allows(names: str) -> None:
    house = House(names)
    spare = len(names) - house.group().threshold
    total = house.finish(house.collect(names[:spare]))
    np.testing.assert_array_equal(total, total_of(names[spare:]))


def test_with_a_fourth_of_ten_lost_the_sum_stays_closed() -> None:
    house = House(TEN)
    collector = house.collect("abcd")
    with pytest.raises(SecureAggregationError, match="opens one of at least 7"):
        house.confirm("e", collector.alive)
    house = House(TEN)
    with pytest.raises(SecureAggregationError, match="6 sites gave their shares and 7"):
        house.finish(house.collect(), gone="abcd")


def test_a_threshold_is_more_than_two_thirds() -> None:
    for count in range(3, 51):
        names = [f"{number:02}" for number in range(count)]
        group = Group(run="r", round=1, keys=dict.fromkeys(names, bytes(32)))
        assert 3 * group.threshold > 2 * count
        assert 3 * (group.threshold - 1) <= 2 * count


def test_a_masked_vector_is_spread_over_the_ring_and_never_twice_the_same() -> None:
    seen = [from_bytes(House("abc").mask("a").values) for _ in range(50)]
    # Plain values lie below 2^16; of 2000 masked ones about 1000 lie in the upper half.
    upper = sum(int((one >= 2**31).sum()) for one in seen)
    assert abs(upper - 1000) < 200
    assert len({one.tobytes() for one in seen}) == 50


def test_fifty_sites_fit() -> None:
    house = House("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwx")
    total = house.finish(house.collect("ABCDEFGH"), silent="I", gone="KL")
    np.testing.assert_array_equal(total, total_of(set(house.names) - set("ABCDEFGH")))


def test_a_step_that_was_refused_changes_nothing() -> None:
    house = House("abcd")
    collector = house.collect()
    before = house.disks["a"]
    with pytest.raises(SecureAggregationError):
        house.confirm("a", ["b", "c", "d"])
    with pytest.raises(SecureAggregationError):
        house.unmask("a", {}, {})
    assert house.disks["a"] == before
    np.testing.assert_array_equal(house.finish(collector), total_of("abcd"))


def test_a_key_masks_one_vector_only() -> None:
    """With two, their difference is that of the updates: the masks are the same."""
    house = House("abc")
    kept = house.disks["a"]
    house.mask("a")
    with pytest.raises(SecureAggregationError, match="has already done this step"):
        house.mask("a")
    house.disks["a"] = kept
    house.mask("a")  # what the refusal stopped works once it is gone


def test_a_list_of_survivors_is_sorted_complete_and_of_the_rounds_own_sites() -> None:
    house = House("abcd")
    house.collect()
    for wrong in (["b", "a", "c"], ["a", "a", "b", "c"], ["a", "b", "x"], ["b", "c", "d"], []):
        with pytest.raises(SecureAggregationError) as caught:
            house.confirm("a", wrong)
        assert caught.value.rule == "secure_aggregation.survivors"
    assert house.confirm("a", ["a", "b", "c"]) == house.confirm("a", ["a", "b", "c"])


@pytest.mark.parametrize("spoil", ["length", "shares", "stranger"])
def test_a_masked_update_that_does_not_fit_is_not_added(spoil: str) -> None:
    house = House("abc")
    collector = Collector(house.group(), LENGTH)
    masked = house.mask("a")
    if spoil == "length":
        masked.values += b"1234"
    elif spoil == "shares":
        del masked.sealed["b"]
    else:
        masked.sealed["x"] = b"1"
    with pytest.raises(UpdateError, match="does not have 40 values and shares"):
        collector.add("a", masked)
    assert collector.alive == ()


def test_shares_that_are_altered_on_the_way_do_not_open() -> None:
    house = House("abc")
    collector = house.collect()
    signatures = {name: house.confirm(name, "abc") for name in "abc"}
    sealed = collector.sealed_for("a")
    for wrong in (
        {**sealed, "b": sealed["b"][:-1] + bytes([sealed["b"][-1] ^ 1])},
        {**sealed, "b": collector.sealed_for("c")["b"]},
        {**sealed, "b": sealed["c"]},
        {"a": sealed["a"], "c": sealed["c"]},
    ):
        with pytest.raises(SecureAggregationError, match="has sealed for site a"):
            house.unmask("a", signatures, wrong)


def test_a_wrong_share_is_noticed_and_a_wrong_set_of_shares_refused() -> None:
    house = House("abcdefg")
    collector = house.collect("fg")
    alive = collector.alive
    signatures = {name: house.confirm(name, alive) for name in alive}
    shares = {n: house.unmask(n, signatures, collector.sealed_for(n)) for n in alive}
    with pytest.raises(UpdateError, match="site a's shares are not those"):
        collector.take("a", shares["a"][:-1])
    lie = [pb.Share(site=s.site, peer=s.peer, value=b"\x01" * 17) for s in shares["a"]]
    for name, own in {**shares, "a": lie}.items():
        collector.take(name, own)
    # One in four wrong secrets is small enough to pass for one; of fifteen not all are.
    with pytest.raises(SecureAggregationError, match="do not belong together"):
        collector.open()


def test_a_signature_of_another_list_is_found_before_it_is_passed_on() -> None:
    house = House("abcd")
    collector = house.collect("d")
    wrong = signing_key("b").sign(collector.group.alive_statement(("a", "b")))
    with pytest.raises(UpdateError, match="site b has not signed"):
        collector.check_confirmation("b", wrong, signing_key("b").public_key())


def test_who_is_lost_gives_no_secret_and_who_is_alive_no_common_mask() -> None:
    """Never both: own masks of survivors only, common masks across the line only."""
    house = House("abcdefg")
    collector = house.collect("fg")
    signatures = {name: house.confirm(name, "abcde") for name in "abcde"}
    for name in "abcde":
        shares = house.unmask(name, signatures, collector.sealed_for(name))
        given = {(one.site, one.peer) for one in shares}
        assert given == set(itertools.product("abcde", ("", "f", "g")))


def test_values_of_sites_differ_so_that_a_sum_shows_who_is_in_it() -> None:
    assert len({values_of(name).tobytes() for name in TEN}) == len(TEN)
