"""A stratified split: every partition gets the same share of every label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner


class StratifiedPartitioner(Partitioner):  # type: ignore[misc]  # it ships no types
    """Deals each label's rows in turn, so that numbers differ by one at most.

    That holds for the rows of each label and for all rows: the next label goes on with the
    partition at which the last one ended.

    Args:
        num_partitions: how many; at most the number of rows.
        partition_by: the column of labels.
        seed: which of a label's rows go where.
    """

    def __init__(self, num_partitions: int, partition_by: str, seed: int) -> None:
        super().__init__()
        self._num_partitions = num_partitions
        self._partition_by = partition_by
        self._seed = seed
        self._order: list[int] | None = None

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        """One partition's rows, label by label.

        Args:
            partition_id: from 0.

        Raises:
            ValueError: there are more partitions than rows, or no such partition.
        """
        if not 0 <= partition_id < self._num_partitions <= len(self.dataset):
            raise ValueError(
                f"partition {partition_id} of {self._num_partitions} cannot be made of "
                f"{len(self.dataset)} rows"
            )
        if self._order is None:
            self._order = _sort_by_label(self.dataset[self._partition_by], self._seed)
        return self.dataset.select(self._order[partition_id :: self._num_partitions])


def _sort_by_label(labels: Sequence[str], seed: int) -> list[int]:
    """Row numbers, those of one label together and in a drawn order."""
    draw = np.random.default_rng(seed).permutation(len(labels))
    return sorted((int(index) for index in draw), key=lambda index: labels[index])
