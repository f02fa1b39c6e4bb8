"""Setting: what the attacks are tried on, and the runs that a curious aggregator asks for.

It writes a run's configuration, and within a default policy it may write what it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedqlora.config import RunConfig, validate

OPEN, SUM, PRIVATE = "no protection", "secure aggregation", "differential privacy"
PROTECTIONS = (OPEN, SUM, PRIVATE)

# So small that AdamW's epsilon outweighs the gradient: the step is a plain gradient step, and the
# learning rate brings it back to a size that float32 keeps.
_TINY_NORM, _LARGE_RATE = 1e-12, 1e3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the attacks are tried on.

    Attributes:
        folder: for the sites' state; each trial makes one of its own in it.
        models: folder of base models.
        base: name of the base model.
        epsilon: the promise of the private runs, one run each.
        delta: the promise's delta. An audit of m canaries says little unless it is far below 1/m.
        rank: of the adapter; a policy allows up to 32 by default.
        quantization: of the base.
    """

    folder: Path
    models: Path
    base: str
    epsilon: float
    delta: float = 1e-7
    rank: int = 8
    quantization: str = "nf4"

    def configure(self, protection: str, training: Mapping[str, object], codec: str) -> RunConfig:
        """A run of one round under a protection; every number of `training` is the aggregator's."""
        values: dict[str, object] = {
            "model": {
                "base": self.base,
                "quantization": self.quantization,
                "compute_dtype": "float32",
            },
            "lora": {"rank": self.rank},
            "training": {
                "max_length": 128,
                "packing": protection != PRIVATE,
                "schedule": "constant",
                **training,
            },
            "data": {"validation_fraction": 0},
            "federation": {"rounds": 1, "min_sites": 3},
            "aggregation": {"method": "fedavg", "weighting": "uniform"},
            "codec": {"update": codec},
            "secure_aggregation": {"enabled": protection == SUM},
        }
        if protection == PRIVATE:
            values["privacy"] = {
                "unit": "patient",
                "epsilon": self.epsilon,
                "delta": self.delta,
                "clip_norm": training.get("max_grad_norm", 1.0),
            }
        return validate(RunConfig, values, "attacks")

    def one_step(self, protection: str, batch: int) -> RunConfig:
        """One plain gradient step on so many texts, sent with all bits."""
        training = {"steps": 1, "batch_examples": batch, "learning_rate": _LARGE_RATE}
        return self.configure(protection, {**training, "max_grad_norm": _TINY_NORM}, "float32")
