"""A small federation in one process: the demo's hospitals, the real engine, codec and mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.feedback import Feedback
from demo.baselines import load_sites
from demo.data import make_data
from demo.hospitals import Hospitals
from demo.model import NAME, make_model
from fedqlora.adapter import Adapter, AdapterSpec, initial_adapter
from fedqlora.codec import decode_delta
from fedqlora.config import RunConfig, load_run
from fedqlora.engine.data import Tokenized, load_records, tokenize
from fedqlora.engine.model import BaseModel, resolve_base
from fedqlora.engine.train import Trained, mean_loss, train
from server.aggregation.fedavg import FedAvg
from server.bundle import REPOSITORY


@dataclass(frozen=True)
class Federation:
    """The loaded model and every party's examples."""

    base: BaseModel
    sites: dict[str, list[Tokenized]]
    held_out: list[Tokenized]

    @classmethod
    def load(cls, run: RunConfig, count: int) -> Federation:
        """Make what the demo lacks, then read it; the run's seed deals the records."""
        hospitals = Hospitals(run, count, REPOSITORY)
        make_model(hospitals.models / NAME)
        if not hospitals.data.exists():
            make_data(hospitals.data, count, run.seed)
        base = BaseModel.load(resolve_base(run.model.base, hospitals.models), run.model, run.lora)
        records = load_records(hospitals.held_out)
        held_out = tokenize(records, base.tokenizer, base.family, run.training.max_length)
        return cls(base, load_sites(hospitals, base, run), held_out)

    def start(self, run: RunConfig) -> Adapter:
        """The adapter before round 1."""
        return initial_adapter(self.base.spec(), run.seed, self.base.given())

    def train(self, run: RunConfig, site: str, round_: int, adapter: Adapter) -> Trained:
        """One site's round."""
        return train(
            self.base,
            adapter,
            self.sites[site],
            run.training,
            seed=run.seed,
            site=site,
            round_=round_,
            rounds=run.federation.rounds,
        )

    def run(self, run: RunConfig, folder: Path) -> tuple[Adapter, int]:
        """All rounds; the last adapter, and the bytes of one site's update.

        Args:
            run: its configuration.
            folder: empty; for what the encoding leaves out.
        """
        adapter = self.start(run)
        spec = AdapterSpec.of(adapter)
        for round_ in range(1, run.federation.rounds + 1):
            aggregator = FedAvg(adapter)
            for site in self.sites:
                trained = self.train(run, site, round_, adapter)
                tensors = Feedback(folder / site).encode(
                    trained.delta, run.codec, run=run.name, round_=round_
                )
                aggregator.add(site, decode_delta(tensors, spec), trained.examples)
            adapter = aggregator.finish().adapter
        return adapter, tensors.ByteSize()

    def score(self, run: RunConfig, adapter: Adapter) -> float:
        """Mean loss of a completion token over the held-out texts."""
        return mean_loss(self.base, adapter, self.held_out, run.training)


def load_experiment(rounds: int, steps: int) -> RunConfig:
    """experiments/icd10.toml with other sizes."""
    overrides = {"federation.rounds": rounds, "training.steps": steps}
    return load_run(REPOSITORY / "experiments" / "icd10.toml", overrides)
