"""RunConfig: everything a run is, from one TOML file; frozen, typed, validated once.

The same sections travel to the sites inside signed instructions and are validated there
again, so a field means one thing on both sides. A site's own rules live in `policy.toml`
(client/policy.py) and are never mixed with these.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from fedqlora.aggregation_config import AggregationConfig
from fedqlora.combinations import COMBINATIONS
from fedqlora.continual_config import ContinualConfig
from fedqlora.errors import ConfigError
from fedqlora.homomorphic_encryption_config import HomomorphicEncryptionConfig
from fedqlora.lora_config import LoraConfig
from fedqlora.section import Section
from fedqlora.server_optimizer_config import ServerOptimizerConfig
from fedqlora.site_privacy_config import SitePrivacyConfig
from fedqlora.training_config import TrainingConfig


class ModelConfig(Section):
    """The base model, the same at every site."""

    base: str = Field(min_length=1)
    """A Hugging Face hub id (`google/flan-t5-base`) or the name of a folder under the
    trainer's `--models`."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314)."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: bfloat16 where the device computes in it natively, float32 elsewhere."""


class DataConfig(Section):
    """How a site splits its records."""

    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of patients (rows where no patient_id is given) held back for validation."""
    validation_examples: int = Field(default=32, ge=0)
    """At most this many validation examples are scored before each round's training;
    0 scores none."""


class FederationConfig(Section):
    """Rounds and who must take part."""

    rounds: int = Field(default=4, ge=1)
    """Number of rounds."""
    min_sites: int = Field(default=2, ge=1)
    """A run starts, and a round counts, with at least so many sites."""
    wait_seconds: float = Field(default=300.0, gt=0)
    """How long the start waits for `min_sites`."""
    expected_sites: int | None = Field(default=None, ge=1)
    """Start at once when so many have joined; without it every registered site is awaited
    for as long as `wait_seconds` allows."""
    round_deadline_seconds: float = Field(default=1800.0, gt=0)
    """A site whose reply comes later is named and left out of the round."""
    late_updates: Literal["discard", "use"] = "discard"
    """`use`: a site that was late is not asked in the next round, and its update counts there if it
    comes by that one's deadline; after that it is discarded."""
    sample_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the connected sites that each round asks, rounded up, but `min_sites` at least.
    Seed, round and name decide which."""
    sample_sites: int | None = Field(default=None, ge=1)
    """Number of sites that each round asks, instead of a share."""

    @model_validator(mode="after")
    def _order(self) -> FederationConfig:
        if self.expected_sites is not None and self.expected_sites < self.min_sites:
            raise ValueError(
                "expected_sites is smaller than min_sites; raise it or lower min_sites"
            )
        if self.sample_sites is not None and self.sample_sites < self.min_sites:
            raise ValueError("sample_sites is smaller than min_sites; raise it or lower min_sites")
        if self.sample_sites is not None and self.sample_fraction < 1:
            raise ValueError("sample_sites and sample_fraction both say how many; leave one out")
        return self


class PrivacyConfig(Section):
    """What each site promises about one unit of its data over the whole run (DP-SGD)."""

    unit: Literal["none", "example", "patient"] = "none"
    """Whose presence is hidden: `patient` all of one patient's examples together, `example` each
    one by itself; `none` promises nothing."""
    epsilon: float | None = Field(default=None, gt=0)
    """The promise over all rounds; each site works its noise out from it before it starts."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Probability with which the promise may fail; without it 1/(n ln n) for a site's n units."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest L2 norm, over all trainable tensors, of what one unit adds to a step."""
    max_examples_per_patient: int = Field(default=8, ge=1)
    """Of each patient the first so many examples are used; unit `example` uses all."""


class SecureAggregationConfig(Section):
    """Whether the coordinator learns the sum of the sites' updates and figures only.

    Updates then travel as 32-bit numbers, whatever `codec.update` says (docs/privacy.md).
    """

    enabled: bool = False
    """Mask every update."""
    largest_value: float = Field(default=1.0, gt=0)
    """Largest magnitude of a value in an update; a site with a larger one is left out of the round.
    A sum is exact to a few hundred-millionths of it."""
    answer_seconds: float = Field(default=60.0, gt=0)
    """How long a site may take for each of the two short steps that follow the updates."""


class CodecConfig(Section):
    """How adapters travel. The server always sends float32."""

    update: Literal["bfloat16", "float32", "int8", "nf4", "topk"] = "bfloat16"
    """Encoding of the updates that sites send: all bits, 16 of 32, 8 or 4 bits in blocks of
    64, or the largest values only."""
    topk_fraction: float = Field(default=0.1, ge=0.001, le=1)
    """Share of an update's values that `topk` sends."""
    error_feedback: bool = True
    """What `int8`, `nf4` or `topk` left out of an update stays at its site and is added to
    the site's next update (arXiv 1809.07599)."""

    @property
    def keeps_error(self) -> bool:
        """Whether sites keep what the encoding left out."""
        return self.error_feedback and self.update in ("int8", "nf4", "topk")


class EvaluationConfig(Section):
    """Central evaluation on the held-out set of the evaluator service."""

    enabled: bool = False
    """Ask the evaluator for a score of the base model and after rounds."""
    every_rounds: int = Field(default=1, ge=1)
    """Evaluate after every so many rounds, and always after the last."""
    max_examples: int | None = Field(default=None, ge=1)
    """Score at most so many examples of each held-out file (the first, in file order)."""
    answer_tokens: int = Field(default=0, ge=0, le=1024)
    """Longest answer, in tokens, that is written for each row by greedy decoding and scored by
    exact match and ROUGE; 0 writes none."""
    probe: bool = False
    """Also score plain questions that no task is about, as `general` (engine/probe.py)."""


class RunConfig(Section):
    """One run."""

    name: str = Field(default="run", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    """Lower-case letters, digits and hyphens; part of the run folder's name."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seeds the adapter's start and, with site and round, the order of the data."""
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()
    codec: CodecConfig = CodecConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    site_privacy: SitePrivacyConfig = SitePrivacyConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    homomorphic_encryption: HomomorphicEncryptionConfig = HomomorphicEncryptionConfig()
    continual: ContinualConfig = ContinualConfig()

    @model_validator(mode="after")
    def _private(self) -> RunConfig:
        """Refuse what would break a promise of privacy, or could not be exact."""
        if self.privacy.unit == "none":
            return self
        if self.privacy.epsilon is None:
            raise ValueError("privacy.unit needs privacy.epsilon; set it")
        if self.training.packing:
            raise ValueError(
                "packing lays several patients into one row, whose gradients cannot be told "
                "apart; set training.packing = false"
            )
        if self.aggregation.weighting != "uniform":
            raise ValueError(
                f"weighting by {self.aggregation.weighting} releases an exact count of private "
                'data; set aggregation.weighting = "uniform"'
            )
        if self.data.validation_fraction > 0:
            raise ValueError(
                "one patient more can move another between training and validation, and an exact "
                "validation loss may not leave; set data.validation_fraction = 0"
            )
        if self.lora.dora:
            raise ValueError(
                "per-patient gradients of DoRA's magnitudes are not supported; set "
                "lora.dora = false"
            )
        return self

    @property
    def sums_only(self) -> bool:
        """Whether the coordinator learns the sum of the sites' updates only."""
        return self.secure_aggregation.enabled or self.homomorphic_encryption.enabled

    @property
    def most_weight(self) -> int:
        """The largest weight that a site can earn in a round."""
        examples = self.training.steps * self.training.batch_examples
        return self.weight_of(examples, examples * self.training.max_length)

    def weight_of(self, examples: int, tokens: int) -> int:
        """The weight of a site that trained so much."""
        return {"examples": examples, "tokens": tokens, "uniform": 1}[self.aggregation.weighting]

    @property
    def task(self) -> str:
        """Name of what this run learns."""
        return self.continual.task or self.name

    @property
    def residual_rank(self) -> int:
        """Largest rank of the residual adapter; 0 where there is none."""
        if self.aggregation.method != "exact_svd":
            return self.continual.frozen_rank
        given = self.aggregation.residual_rank
        return 4 * self.lora.rank if given is None else given

    @model_validator(mode="after")
    def _fit(self) -> RunConfig:
        for combination in COMBINATIONS:
            if combination.is_asked_for(self):
                raise ValueError(combination.sentence)
        return self


SectionT = TypeVar("SectionT", bound=Section)


def load_run(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read and validate a run's TOML.

    Args:
        path: the TOML file.
        overrides: values by dotted key, such as `{"federation.rounds": 6}`, that win over
            the file.

    Raises:
        ConfigError: the file is missing, is not TOML, or a key or value is wrong.
    """
    values = read_toml(path)
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: {dotted} is not a known key; {parent} is no section")
        table[leaf] = value
    return validate(RunConfig, values, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file, or raise ConfigError in one sentence."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name an existing TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); check the file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from None


def validate(section: type[SectionT], values: dict[str, Any], where: str) -> SectionT:
    """Build a section from plain values.

    Args:
        section: the class to build.
        values: what a TOML or JSON parser gave.
        where: the file's name, for the message.

    Raises:
        ConfigError: names the first wrong key, and the nearest known one if it is unknown.
    """
    try:
        return section.model_validate(values, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            known = _keys_at(section, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: {key} is not a known key; {hint}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}: {key} is missing; add it") from None
        reason = first["msg"].removeprefix("Value error, ")
        if not first["loc"] and first["type"] == "value_error":
            raise ConfigError(f"{where}: {reason}") from None
        raise ConfigError(f"{where}: {key} is wrong: {reason[:1].lower()}{reason[1:]}") from None


def _keys_at(section: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """The known keys of the (nested) section at a pydantic error location."""
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        ):
            return []
        section = field.annotation
    return list(section.model_fields)
