"""The demo's partitions: how hospitals differ under each, and a picture of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.codes import CHAPTERS
from demo.data import make_row, make_task
from demo.partition import PARTITIONS, SMALLEST_SITE, Partition, Row, split
from demo.picture import draw
from demo.stratified import StratifiedPartitioner
from fedqlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [make_row(text) for text in make_task(seed=1).training]


def count_chapters(part: list[Row]) -> np.ndarray:
    counts = Counter(row["chapter"] for row in part)
    return np.array([counts[chapter] for chapter in CHAPTERS.values()])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_row_goes_to_one_hospital_and_a_seed_to_one_deal(
    rows: list[Row], partition: Partition
) -> None:
    parts = split(rows, 4, partition, seed=1)
    dealt = Counter(row["code"] for part in parts for row in part)
    assert max(dealt.values()) == 1
    # Only runs of equal length leave some out.
    assert len(rows) - len(dealt) <= (7 if partition == "label" else 0)
    assert min(map(len, parts)) >= SMALLEST_SITE
    assert split(rows, 4, partition, seed=1) == parts


def test_hospitals_differ_as_the_partition_says(rows: list[Row]) -> None:
    parts = {name: split(rows, 4, name, seed=1) for name in PARTITIONS}
    seen = {name: np.array([count_chapters(part) for part in own]) for name, own in parts.items()}
    sizes = {name: [len(part) for part in own] for name, own in parts.items()}
    assert np.ptp(seen["stratified"], axis=0).max() <= 1
    assert np.ptp(sizes["stratified"]) <= 1
    # At random a chapter's 160 texts or fewer are dealt unevenly, but everybody has all.
    assert 1 < np.ptp(seen["iid"], axis=0).max() < 40
    assert np.ptp(sizes["iid"]) <= 1
    smallest = sizes["quantity"][0]
    np.testing.assert_allclose(np.array(sizes["quantity"]) / smallest, [1, 2, 3, 4], atol=0.03)
    assert ((seen["label"] > 0).sum(axis=1) < len(CHAPTERS) / 2).all()
    assert np.ptp(seen["dirichlet"], axis=0).max() > 100
    families = [{row["category"] for row in part} for part in parts["natural"]]
    assert len(set.union(*families)) == sum(map(len, families))
    mixed = [{row["category"] for row in part} for part in parts["iid"]]
    assert len(set.union(*mixed)) < sum(map(len, mixed))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 8))
def test_a_stratified_split_is_even_in_all_and_in_every_label(labels: list[str], n: int) -> None:
    partitioner = StratifiedPartitioner(n, "label", seed=3)
    partitioner.dataset = Dataset.from_dict({"label": labels, "row": list(range(len(labels)))})
    if n > len(labels):
        with pytest.raises(ValueError, match=f"cannot be made of {len(labels)} rows"):
            partitioner.load_partition(0)
        return
    parts = [partitioner.load_partition(index) for index in range(partitioner.num_partitions)]
    assert sorted(row for part in parts for row in part["row"]) == list(range(len(labels)))
    assert np.ptp([len(part) for part in parts]) <= 1
    for label in set(labels):
        assert np.ptp([part["label"].count(label) for part in parts]) <= 1


def test_a_hospital_with_too_few_rows_is_refused(rows: list[Row]) -> None:
    # The first of 26 gets one of 351 parts.
    with pytest.raises(ConfigError, match="choose fewer SITES"):
        split(rows, 26, "quantity", seed=1)


def test_the_picture_shows_every_hospital_and_chapter_and_the_same_deal_the_same_bytes(
    tmp_path: Path,
) -> None:
    hospitals = {
        "a": [{"chapter": "Eye"}] * 3 + [{"chapter": "Ear"}],
        "b": [{"chapter": "Ear"}] * 2,
    }
    draw(hospitals, tmp_path / "1.svg")
    draw(hospitals, tmp_path / "2.svg")
    text = (tmp_path / "1.svg").read_text()
    assert text == (tmp_path / "2.svg").read_text()
    words = {element.text for element in ElementTree.fromstring(text).iter()}  # noqa: S314
    assert {"a", "b", "records", *CHAPTERS.values()} <= words
    draw({**hospitals, "b": hospitals["a"]}, tmp_path / "2.svg")
    assert text != (tmp_path / "2.svg").read_text()
    with pytest.raises(DataError, match="cannot be written"):
        draw(hospitals, tmp_path / "missing" / "1.svg")
