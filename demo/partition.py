"""Partition: ways to deal rows to sites, most of them by flwr-datasets."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

from demo.names import LETTERS
from fedqlora.errors import ConfigError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Partition = Literal["dirichlet", "iid", "label", "natural", "quantity", "stratified"]
"""dirichlet    every hospital sees every chapter in another proportion (arXiv 1909.06335)
iid          texts at random, equally many each
label        two runs of texts sorted by chapter each: few chapters a hospital (arXiv 1602.05629)
natural      whole disease families (categories), in the classification's order
quantity     texts at random, the second hospital twice as many as the first, and so on
stratified   the same number of every chapter at every hospital"""
PARTITIONS: tuple[Partition, ...] = get_args(Partition)

ALPHA = 0.2
"""Of `dirichlet`: the smaller, the more the hospitals differ in the chapters that they see."""
SMALLEST_SITE = 32
"""Records; a Dirichlet deal that gives a hospital fewer is dealt again, any other is refused."""
SMALLEST_OF_MANY = 10
"""The same for more than 26 hospitals, whose shares are small and whose skew is less strong."""

Row = dict[str, str]


def split(
    rows: list[Row],
    sites: int,
    partition: Partition,
    seed: int,
    *,
    label: str = "chapter",
    group: str = "category",
) -> list[list[Row]]:
    """Each hospital's rows; a row goes to one hospital.

    `label` leaves out what does not fill a run of equal length: fewer than two rows a hospital.

    Args:
        rows: with the columns `label` and `group`.
        sites: number of hospitals.
        partition: how they are dealt.
        seed: where there is a draw.
        label: the column whose values hospitals see more or less of.
        group: the column whose values stay together in `natural`.

    Raises:
        ConfigError: a hospital would get fewer than the least number of rows.
    """
    # Only here, as it loads for a second, and records are dealt once.
    from datasets import Dataset

    smallest = SMALLEST_SITE if sites <= LETTERS else SMALLEST_OF_MANY
    partitioner = _make_partitioner(rows, sites, partition, seed, smallest, label, group)
    dataset = Dataset.from_list(rows)
    # These two take consecutive rows, which come chapter by chapter.
    partitioner.dataset = (
        dataset.shuffle(seed=seed) if partition in ("iid", "quantity") else dataset
    )
    try:
        with warnings.catch_warnings():
            # Dirichlet warns each time that it deals again, which is wanted here; sorting for
            # shards calls pyarrow by a name that a later one will change.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            parts = [list(partitioner.load_partition(index)) for index in range(sites)]
    except ValueError:
        parts = []
    if min(map(len, parts), default=0) < smallest:
        raise ConfigError(f"{sites} sites cannot all get {smallest} records; choose fewer SITES")
    return parts


def _make_partitioner(
    rows: list[Row],
    sites: int,
    partition: Partition,
    seed: int,
    smallest: int,
    label: str,
    group: str,
) -> Partitioner:
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        GroupedNaturalIdPartitioner,
        IidPartitioner,
        LinearPartitioner,
        ShardPartitioner,
    )

    from demo.stratified import StratifiedPartitioner

    named: dict[str, Any] = {"num_partitions": sites, "partition_by": label, "seed": seed}
    if partition == "dirichlet":
        # With the same alpha most of a hundred hospitals would get next to nothing.
        alpha = ALPHA * max(1.0, sites / LETTERS)
        return DirichletPartitioner(**named, alpha=alpha, min_partition_size=smallest)
    if partition == "iid":
        return IidPartitioner(num_partitions=sites)
    if partition == "label":
        return ShardPartitioner(**named, num_shards_per_partition=2)
    if partition == "natural":
        groups = len({row[group] for row in rows})
        size = max(1, groups // sites)
        return GroupedNaturalIdPartitioner(group, group_size=size, mode="allow-bigger")
    if partition == "quantity":
        return LinearPartitioner(num_partitions=sites)
    return StratifiedPartitioner(**named)
