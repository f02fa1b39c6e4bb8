"""The demo's hospitals: their certificates, records, policies and the shared base model.

An experiment that is a story (demo/stories.py) has the story's records, and a base model from the
hub; one that names a task has that task's ICD-10 texts (demo/wards.py); every other has all ICD-10
texts. Without a story the base model is one of the demo's.
"""

from __future__ import annotations

from pathlib import Path

from certs.roster import ROSTER_FILE, SIGNATURE_FILE
from client.fetch import fetch
from client.peers import name_key
from demo.commands import LocalSite
from demo.data import describe, make_data
from demo.earlier import SITES
from demo.keys import make_keys
from demo.layout import count_labels
from demo.model import MODELS
from demo.names import LETTERS, MOST_SITES, site_names
from demo.partition import Partition
from demo.policy import render_policy
from demo.stories import STORIES, make_story
from demo.stories import describe as describe_story
from demo.wards import check_task, make_wards
from fedqlora.config import RunConfig
from fedqlora.engine.base import base_digest
from fedqlora.errors import ConfigError
from fedqlora.files import write_durably
from fedqlora.keys import load_signing_key


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
        self._task = config.continual.task if self._story is None else None
        self._earlier = config.continual.earlier
        if self._task is not None:
            check_task(self._task)
        chain = "".join(f"{name}-after-" for name in (self._task, *reversed(self._earlier)) if name)
        dealt = f"{chain.removesuffix('after-')}{count}-sites-seed-{config.seed}-{partition}"
        self.data = home / ".cache" / kind / dealt
        self._seed = config.seed
        self._partition = partition
        self._summed = config.sums_only
        encryption = config.homomorphic_encryption
        self.key_sites = (str(encryption.key_site),) if encryption.enabled else ()
        """Hospitals that may decrypt a sum, if the run encrypts its updates."""
        self._private = config.privacy.unit != "none"
        self._simulated = simulated

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
        digest, peers = self.digest(), self.peers()
        if self._summed:
            self._hand_out_roster()
        for name in self.names:
            policy = self._policy(name)
            text = policy.read_text(encoding="utf-8") if policy.exists() else ""
            # A hospital's own edits stay; a new base model or peer needs a new approval.
            if not all(one in text for one in (digest, *peers.values())):
                approved = render_policy(digest, peers=peers, key_sites=self.key_sites)
                policy.write_text(approved, encoding="utf-8")

    def _deal(self) -> str:
        """Deal the records; returns what to say about it."""
        count = len(self.names)
        if self._story is not None:
            dealt = make_story(self._story, self.data, count, self._seed, self._partition)
            return describe_story(dealt, self._story.label)
        if self._task is None:
            dealt = make_data(self.data, count, self._seed, self._partition)
        else:
            dealt = make_wards(
                self.data, count, self._seed, self._task, self._earlier, self._partition
            )
        # Only here, as it loads matplotlib.
        from demo.picture import draw

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

    def peers(self) -> dict[str, str]:
        """The fingerprints of all hospitals' signing keys, if the run opens sums only."""
        if not self._summed:
            return {}
        return {
            name: name_key(load_signing_key(self._keys(name) / "signing.key").public_key())
            for name in self.names
        }

    def state(self, runs: Path, name: str) -> Path:
        """Where a hospital's trainer keeps what outlives a run, in a folder of run folders."""
        return runs / SITES / (name if self._simulated else f"trainer-{name}")

    def make_ledgers(self, runs: Path) -> None:
        """Give each hospital that never had one a ledger of privacy spent, if the run promises any.

        Args:
            runs: folder of run folders.

        Raises:
            LedgerError: a hospital had one, and it is gone.
        """
        if not self._private:
            return
        # Only here, as the accounting behind it loads far more than a demo otherwise needs.
        from client.ledger import make_ledger

        for name in self.names:
            state = self.state(runs, name)
            state.mkdir(parents=True, exist_ok=True)
            make_ledger(name, state, load_signing_key(self._keys(name) / "signing.key"))

    def _hand_out_roster(self) -> None:
        """Give each hospital the signed roster, in which its trainer looks for pinned peers."""
        for file in (ROSTER_FILE, SIGNATURE_FILE):
            content = (self.certs / "coordinator" / file).read_bytes()
            for name in self.names:
                write_durably(self._keys(name) / file, content)

    def _keys(self, name: str) -> Path:
        return self.certs / "sites" / name / "current"

    def _policy(self, name: str) -> Path:
        parts = [name, "policy"]
        if self._summed:
            parts += ["summed", *(f"by-{site}" for site in self.key_sites)]
        return self.data / f"{'.'.join(parts)}.toml"
