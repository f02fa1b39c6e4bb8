"""Examples: a site's records as the trainer uses them, read once per configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedqlora.config import RunConfig
from fedqlora.engine.data import Tokenized, load_records, split_records, tokenize
from fedqlora.engine.model import BaseModel
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
    """Reads and tokenizes a site's records, again only for another model or configuration.

    Args:
        site: the site's name, for the message.
        data: file or folder of records, never written.
    """

    def __init__(self, site: str, data: Path) -> None:
        self._site = site
        self._data = data
        self._newest: tuple[object, Examples] | None = None

    def read(self, base: BaseModel, digest: str, config: RunConfig) -> Examples:
        """The site's examples.

        Args:
            base: tokenizes them.
            digest: of the base model.
            config: the split, the longest example and the seed.

        Raises:
            DataError: a file cannot be used, or there are too few records.
        """
        key = (digest, config.data, config.training.max_length, config.seed)
        if self._newest is None or self._newest[0] != key:
            self._newest = (key, self._read(base, config))
        return self._newest[1]

    def _read(self, base: BaseModel, config: RunConfig) -> Examples:
        records = load_records(self._data)
        parts = split_records(records, config.data.validation_fraction, config.seed)
        training, validation = (
            tokenize(part, base.tokenizer, base.family, config.training.max_length)
            for part in parts
        )
        if len(training) < MIN_EXAMPLES:
            raise DataError(
                f"site {self._site} has {len(training)} training records and needs at least "
                f"{MIN_EXAMPLES}; add records or lower data.validation_fraction"
            )
        return Examples(training, validation, [record.patient for record in parts[0]])
