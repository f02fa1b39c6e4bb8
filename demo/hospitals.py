"""The demo's hospitals: their certificates, records, policies and the shared base model."""

from __future__ import annotations

from pathlib import Path

from certs.files import CertificateError
from certs.inspection import inspect_all
from certs.site import make_all
from demo.commands import LocalSite
from demo.data import describe, make_data, site_names
from demo.model import NAME, make_model
from fedqlora.config import RunConfig
from fedqlora.engine.base import base_digest
from fedqlora.errors import ConfigError

POLICY = """\
# What this hospital allows, whatever the coordinator asks. Every key: client/policy.py.

[models]
# Base models that may see our records; `python -m client digest` prints a folder's digest.
digests = ["{digest}"]

[limits]
rank = 64
steps = 200
rounds = 100

[metrics]
allowed = ["examples", "tokens", "train_loss", "validation_loss", "step_seconds"]
"""


class Hospitals:
    """Everything that a demo run reads; made once and used again.

    Args:
        config: the run; its seed deals the records.
        count: number of hospitals.
        home: folder that keeps certificates, model and records.

    Raises:
        ConfigError: the number is out of range, or the run wants another base model.
    """

    def __init__(self, config: RunConfig, count: int, home: Path) -> None:
        if config.model.base != NAME:
            raise ConfigError(
                f"the demo has the base model {NAME} only, not {config.model.base}; "
                "set model.base to it"
            )
        self.names = site_names(count)
        self.certs = home / "certs" / "out"
        self.models = home / ".cache" / "models"
        self.data = home / ".cache" / "icd10" / f"{count}-sites-seed-{config.seed}"
        self._seed = config.seed

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
            FedqloraError: model or records cannot be made.
        """
        if make_model(self.models / NAME):
            print(f"made base model {NAME}", flush=True)
        if not self.data.exists():
            print(describe(make_data(self.data, len(self.names), self._seed)), flush=True)
        for line in make_all(self.certs, self.names):
            print(line, flush=True)
        if problems := inspect_all(self.certs).problems:
            raise CertificateError(
                f"{self.certs} is not usable: {problems[0]}; `make verify-certs` shows all, and "
                "in development the folder can be removed: the next run makes it anew"
            )
        digest = base_digest(self.models / NAME)
        for name in self.names:
            policy = self._policy(name)
            # A hospital's own edits stay; a new base model needs a new approval.
            if not policy.exists() or digest not in policy.read_text(encoding="utf-8"):
                policy.write_text(POLICY.format(digest=digest), encoding="utf-8")

    def _policy(self, name: str) -> Path:
        return self.data / f"{name}.policy.toml"
