"""The site's policy: what the hospital allows, whatever the coordinator asks.

`policy.toml` is the hospital's own file. An instruction outside it is refused with the
rule's name, before any record is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from fedqlora.config import RunConfig, read_toml, validate
from fedqlora.errors import PolicyRefusal
from fedqlora.section import Section
from fedqlora.training_config import TrainingConfig

Metric = Literal["examples", "tokens", "train_loss", "validation_loss", "step_seconds"]
"""Everything about a round that may leave a site beside the update."""

Fingerprint = Annotated[str, Field(pattern=r"^[A-Z2-7]{4}(-[A-Z2-7]{4}){5}$")]
"""Of a signing key: six groups of four, as `python -m certs accept` prints it."""


class Models(Section):
    """Which base models may see this site's records."""

    digests: tuple[str, ...] = Field(min_length=1)
    """SHA-256 digests of approved base models, as `python -m client digest` prints."""


class Apps(Section):
    """Which Flower apps may run beside the trainer; they reach nothing but its socket."""

    digests: tuple[str, ...] = ()
    """SHA-256 digests of approved apps, as `python -m server digest` prints; none: any app."""


class Limits(Section):
    """The most that one run may ask for."""

    rank: int = Field(default=32, ge=1)
    """Largest LoRA rank that trains here: bounds how much an update, or a sum of them, can carry
    (docs/attacks.md). What the coordinator sends to lie frozen beside it does not leave and is not
    counted."""
    steps: int = Field(default=200, ge=1)
    """Most optimizer steps in one round."""
    rounds: int = Field(default=100, ge=1)
    """Most rounds in one run."""


class Metrics(Section):
    """Which figures may leave beside the update."""

    allowed: tuple[Metric, ...] = get_args(Metric)
    """Names out of: examples, tokens, train_loss, validation_loss, step_seconds."""


class Privacy(Section):
    """What every run must promise about this site's patients."""

    unit: Literal["none", "example", "patient"] = "none"
    """The weakest unit that is accepted; `patient` is the strongest, `none` asks for nothing."""
    epsilon: float | None = Field(default=None, gt=0)
    """Most that one cohort gives away, at `delta`, over all runs ever; none: no limit."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Largest delta of a run, and the one at which the cohort's epsilon is counted."""
    cohort: str = Field(default="all", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    """Name of the patients whose records lie in the trainer's data folder. Another name starts
    another account, so it is changed only for other patients."""

    @model_validator(mode="after")
    def _complete(self) -> Privacy:
        if self.epsilon is not None and (self.delta is None or self.unit == "none"):
            raise ValueError("epsilon means nothing without delta and unit; set all three")
        return self


class SecureAggregation(Section):
    """In whose company an update may leave."""

    required: bool = False
    """Whether every run has to use secure aggregation, so that nobody sees this site's update."""
    sites: int = Field(default=3, ge=3, le=50)
    """Fewest sites whose updates are summed, this one included. Only sites that `peers` names
    count; 5 or more are advised. More than two thirds of a round's sites have to open the sum,
    whatever the coordinator asks."""


class HomomorphicEncryption(Section):
    """Whom this site trusts with the key to a sum."""

    key_sites: tuple[str, ...] = ()
    """Sites under whose key this site's update may leave encrypted, out of `peers`; with the
    coordinator's help they could read it. Such a sum has at least `secure_aggregation.sites`."""


class Policy(Section):
    """All rules of one site; a rule's name is its dotted key."""

    models: Models
    apps: Apps = Apps()
    limits: Limits = Limits()
    metrics: Metrics = Metrics()
    peers: Mapping[str, Fingerprint] = Field(default_factory=dict)
    """The other sites that count, with their signing keys' fingerprints as the hospitals have
    compared them: the roster alone adds no peer (client/peers.py)."""
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    homomorphic_encryption: HomomorphicEncryption = HomomorphicEncryption()


def load_policy(path: Path) -> Policy:
    """Read `policy.toml`.

    Raises:
        ConfigError: the file is missing or wrong; a site without a policy does not start.
    """
    return validate(Policy, read_toml(path), str(path))


def own_training(policy: Policy, asked: TrainingConfig) -> TrainingConfig:
    """What this site trains of what a run asks for: fewer steps where both sides agree to that."""
    if not asked.fewer_steps:
        return asked
    return asked.model_copy(update={"steps": min(asked.steps, policy.limits.steps)})


def training_rank(policy: Policy, config: RunConfig) -> int:
    """The rank at which a run trains here: its own, or the policy's where it allows mixed ranks."""
    rank = config.lora.rank
    return min(rank, policy.limits.rank) if config.lora.mixed_ranks else rank


def check(
    policy: Policy, config: RunConfig, round_: int, base_digest: str, app_digest: str
) -> None:
    """Refuse an instruction that the policy does not allow.

    Guarantee: it reads no record and needs none; the caller opens the data only after this.

    Args:
        policy: the site's rules.
        config: what the run asks for.
        round_: the instruction's round (0 describes).
        base_digest: digest of the base model that the site has under the run's name.
        app_digest: digest of the app that the coordinator says, signed, that it runs. What does
            run at the site is judged by the SuperNode (client/apps.py); this refuses who claims
            another.

    Raises:
        PolicyRefusal: names the first broken rule.
    """
    if policy.apps.digests and app_digest not in policy.apps.digests:
        raise PolicyRefusal(
            "apps.digests",
            f"the site's policy does not approve app {app_digest[:16] or 'without a digest'}, "
            "which the coordinator says that it runs (apps.digests)",
        )
    if base_digest not in policy.models.digests:
        raise PolicyRefusal(
            "models.digests",
            f"the site's policy does not approve base model {config.model.base} "
            f"with digest {base_digest[:16]} (models.digests)",
        )
    asked = (
        ("limits.rank", training_rank(policy, config), policy.limits.rank),
        ("limits.steps", own_training(policy, config.training).steps, policy.limits.steps),
        ("limits.rounds", max(config.federation.rounds, round_), policy.limits.rounds),
    )
    for rule, wanted, most in asked:
        if wanted > most:
            raise PolicyRefusal(
                rule, f"the site's policy allows {most}, the run asks for {wanted} ({rule})"
            )
    _check_promise(policy.privacy, config)
    if policy.secure_aggregation.required and not config.secure_aggregation.enabled:
        raise PolicyRefusal(
            "secure_aggregation.required",
            "the site's policy lets an update out in a sum only; set "
            "secure_aggregation.enabled = true (secure_aggregation.required)",
        )
    weighting = config.aggregation.weighting
    if weighting != "uniform" and weighting not in policy.metrics.allowed:
        raise PolicyRefusal(
            "metrics.allowed",
            f"the run weights sites by {weighting}, which the site's policy does not let out; "
            'set aggregation.weighting = "uniform" (metrics.allowed)',
        )


def check_key_site(policy: Policy, config: RunConfig, site: str) -> None:
    """Refuse a run whose key somebody holds whom the policy does not name.

    Args:
        policy: the site's rules.
        config: the run, with homomorphic encryption.
        site: the site's own name; its own key it trusts.

    Raises:
        PolicyRefusal: the run's key site is not among the policy's.
    """
    asked = config.homomorphic_encryption.key_site
    if asked not in (site, *policy.homomorphic_encryption.key_sites):
        raise PolicyRefusal(
            "homomorphic_encryption.key_sites",
            f"the site's policy does not let site {asked} hold the key to its update "
            "(homomorphic_encryption.key_sites)",
        )


_STRENGTH = {"none": 0, "example": 1, "patient": 2}


def _check_promise(privacy: Privacy, config: RunConfig) -> None:
    """Refuse a weaker promise than the policy's; what was spent before is budget.py's."""
    asked = config.privacy
    if _STRENGTH[asked.unit] < _STRENGTH[privacy.unit]:
        raise PolicyRefusal(
            "privacy.unit",
            f'the site\'s policy asks for privacy.unit = "{privacy.unit}", the run has '
            f'"{asked.unit}" (privacy.unit)',
        )
    for rule, wanted, most in (
        ("privacy.epsilon", asked.epsilon, privacy.epsilon),
        ("privacy.delta", asked.delta, privacy.delta),
    ):
        if wanted is not None and most is not None and wanted > most:
            raise PolicyRefusal(
                rule, f"the site's policy allows {most:g}, the run asks for {wanted:g} ({rule})"
            )
