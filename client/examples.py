"""Examples: a site's records as the trainer uses them, read once per configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedqlora.config import RunConfig
from fedqlora.engine.data import Record, Tokenized, load_records, split_records, tokenize
from fedqlora.engine.model import BaseModel
from fedqlora.engine.replay import draw_replay, load_earlier
from fedqlora.errors import DataError

# Below this a loss says more about single records than about learning.
MIN_EXAMPLES = 8


@dataclass(frozen=True)
class Examples:
    """A site's examples, and whose each training example is."""

    training: list[Tokenized]
    validation: list[Tokenized]
    patients: list[str]


class Reader:
    """Reads and tokenizes a site's records once a run: a further task has other records.

    Args:
        site: the site's name, for the message.
        data: file or folder of records, never written.
    """

    def __init__(self, site: str, data: Path) -> None:
        self._site = site
        self._data = data
        self._newest: tuple[object, Examples] | None = None

    def read(self, base: BaseModel, digest: str, config: RunConfig, run: str) -> Examples:
        """The site's examples.

        Args:
            base: tokenizes them.
            digest: of the base model.
            config: the split, the longest example, the seed and what is replayed.
            run: the run's name.

        Raises:
            DataError: a file cannot be used, there are too few records, or none to replay.
        """
        replay = config.continual.replay_fraction
        key = (run, digest, config.data, config.training.max_length, config.seed, replay)
        if self._newest is None or self._newest[0] != key:
            self._newest = (key, self._read(base, config))
        return self._newest[1]

    def _read(self, base: BaseModel, config: RunConfig) -> Examples:
        records = load_records(self._data)
        parts = split_records(records, config.data.validation_fraction, config.seed)
        training, validation = (self._tokenize(part, base, config) for part in parts)
        if len(training) < MIN_EXAMPLES:
            raise DataError(
                f"site {self._site} has {len(training)} training records and needs at least "
                f"{MIN_EXAMPLES}; add records or lower data.validation_fraction"
            )
        replayed = self._replay(config)
        return Examples(
            training + self._tokenize(replayed, base, config),
            validation,
            [record.patient for record in parts[0] + replayed],
        )

    def _replay(self, config: RunConfig) -> list[Record]:
        """Earlier records that are trained on again; validation stays with the new ones."""
        fraction = config.continual.replay_fraction
        if fraction == 0:
            return []
        return draw_replay(load_earlier(self._data, self._site), fraction, config.seed, self._site)

    def _tokenize(
        self, records: Sequence[Record], base: BaseModel, config: RunConfig
    ) -> list[Tokenized]:
        return tokenize(records, base.tokenizer, base.family, config.training.max_length)
