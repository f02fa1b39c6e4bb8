"""The demo's hospitals: their certificates, records, policies and the shared base model.

An experiment that is a story (demo/stories.py) has the story's records, and a base model from the
hub; every other has the ICD-10 texts and a base model of the demo's.
"""

from __future__ import annotations

from pathlib import Path

from client.fetch import fetch
from demo.commands import LocalSite
from demo.data import describe, make_data
from demo.keys import make_keys
from demo.layout import count_labels
from demo.model import MODELS
from demo.names import LETTERS, MOST_SITES, site_names
from demo.partition import Partition
from demo.picture import draw
from demo.policy import render_policy
from demo.stories import STORIES, make_story
from demo.stories import describe as describe_story
from fedqlora.config import RunConfig
from fedqlora.engine.base import base_digest
from fedqlora.errors import ConfigError


class Hospitals:
    """Everything that a demo run reads; made once and used again.

    Args:
        config: the run; its seed deals the records.
        count: number of hospitals.
        home: folder that keeps certificates, model and records.
        partition: how the records are dealt.
        simulated: whether they are simulated: then there may be more, with keys of their own.

    Raises:
        ConfigError: the number is out of range, or the run wants another base model.
    """

    def __init__(
        self,
        config: RunConfig,
        count: int,
        home: Path,
        partition: Partition = "dirichlet",
        *,
        simulated: bool = False,
    ) -> None:
        self._story = STORIES.get(config.name)
        if self._story is None and config.model.base not in MODELS:
            raise ConfigError(
                f"the demo has the base models {', '.join(MODELS)} only, not {config.model.base}; "
                "set model.base to one of them"
            )
        self.names = site_names(count, MOST_SITES if simulated else LETTERS)
        self.certs = home / ".cache" / "simulation" / "certs" if simulated else home / "certs/out"
        self._base = config.model.base
        self.models = home / ".cache" / "models"
        kind = "icd10" if self._story is None else config.name
        self.data = home / ".cache" / kind / f"{count}-sites-seed-{config.seed}-{partition}"
        self._seed = config.seed
        self._partition = partition

    @property
    def held_out(self) -> Path:
        """Folder of the evaluator's held-out set."""
        return self.data / "held-out"

    def records(self, name: str) -> Path:
        """Folder of one hospital's records."""
        return self.data / name

    def sites(self) -> list[LocalSite]:
        """Each hospital as the local federation starts it."""
        return [
            LocalSite(name=name, data=self.records(name), policy=self._policy(name))
            for name in self.names
        ]

    def prepare(self) -> None:
        """Make what is missing: model, records, certificates, policies.

        Raises:
            CertificateError: the certificates that are there have expired or do not fit.
            FedqloraError: model or records cannot be made or fetched.
        """
        if self._base in MODELS:
            made = MODELS[self._base](self.models / self._base)
        else:
            _, made = fetch(self._base, self.models)
        if made:
            print(f"made base model {self._base}", flush=True)
        if not self.data.exists():
            print(self._deal(), flush=True)
        advice = (
            "`make verify-certs` shows all, and in development the folder can be removed: the "
            "next run makes it anew"
        )
        for line in make_keys(self.certs, self.names, (), advice):
            print(line, flush=True)
        digest = self.digest()
        for name in self.names:
            policy = self._policy(name)
            # A hospital's own edits stay; a new base model needs a new approval.
            if not policy.exists() or digest not in policy.read_text(encoding="utf-8"):
                policy.write_text(render_policy(digest), encoding="utf-8")

    def _deal(self) -> str:
        """Deal the records; returns what to say about it."""
        count = len(self.names)
        if self._story is not None:
            dealt = make_story(self._story, self.data, count, self._seed, self._partition)
            return describe_story(dealt, self._story.label)
        dealt = make_data(self.data, count, self._seed, self._partition)
        picture = self.data / "deal.svg"
        draw(dealt, picture)
        return f"{describe(dealt)}\npicture: {picture}"

    def skew(self) -> dict[str, dict[str, int]]:
        """How many records of each label each hospital has."""
        label = "chapter" if self._story is None else self._story.label
        return count_labels(self.data, self.names, label)

    def digest(self) -> str:
        """The base model's digest, for a policy."""
        return base_digest(self.models / self._base)

    def _policy(self, name: str) -> Path:
        return self.data / f"{name}.policy.toml"
