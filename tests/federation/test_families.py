"""Each family through a whole federation in one process: real rounds, trainers and envelopes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from client.policy import Models, Policy
from client.worker import SiteWorker
from fedqlora.adapter import Adapter, initial_adapter, rank_of
from fedqlora.audit import AuditLog
from fedqlora.config import ModelConfig, RunConfig, validate
from fedqlora.engine.architectures import ARCHITECTURES
from fedqlora.engine.base import base_digest
from fedqlora.engine.data import Tokenized, load_records, tokenize
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.export import merge
from fedqlora.engine.held_out import load_held_out
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import mean_loss
from fedqlora.engine.warm import WarmModel
from fedqlora.errors import ModelError
from fedqlora.lora_config import LoraConfig
from server.checkpoint import Checkpoint, RunFolder
from server.metrics import Metrics
from server.rounds import federate
from tests.federation.conftest import SITES, write_records
from tests.server.conftest import House, site_key
from tests.tiny_models import SEQ2SEQ, save_tiny


@pytest.fixture(autouse=True)
def _task_identity() -> None:
    """What Flower sets before it calls a ServerApp; its messages carry it."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


class Bench:
    """The evaluator's work on the model that the trainers have loaded."""

    def __init__(self, folder: Path, warm: WarmModel) -> None:
        self._folder = folder
        self._warm = warm
        self.losses: list[float] = []

    def base(self, config: RunConfig) -> BaseModel:
        folder = self._folder / "models" / config.model.base
        return self._warm.get(folder, config.model, config.lora)

    def evaluate(
        self, config: RunConfig, _round: int, adapter: Adapter, residual: Adapter
    ) -> dict[str, dict[str, float]]:
        held_out = load_held_out(self._folder / "held-out", None)
        scores = evaluate(self.base(config), adapter, held_out, config.training, residual)
        self.losses.append(scores["all"]["loss"])
        return scores


def make_trainer(folder: Path, site: str, model_type: str, warm: WarmModel) -> SiteWorker:
    """A site's own trainer, on the one model that all of this process share."""
    policy = Policy(models=Models(digests=(base_digest(folder / "models" / model_type),)))
    audit = AuditLog(folder / site / "trainer-audit.jsonl", site_key(site))
    return SiteWorker(
        site=site,
        data=folder / "data" / site,
        models=folder / "models",
        state=folder / site,
        policy=policy,
        peers={},
        key=site_key(site),
        audit=audit,
        warm=warm,
    )


def settings_of(model_type: str, nf4: bool, **lora: object) -> RunConfig:
    values = {
        "model": {
            "base": model_type,
            "quantization": "nf4" if nf4 else "none",
            "compute_dtype": "float32",
        },
        "lora": {"rank": 4, **lora},
        "training": {
            "steps": 3, "batch_examples": 4, "learning_rate": 1e-2, "schedule": "constant",
        },
        "data": {"validation_examples": 4},
        "federation": {"rounds": 2, "wait_seconds": 5, "expected_sites": len(SITES)},
    }  # fmt: skip
    return validate(RunConfig, values, "test")


class Federation:
    """Two sites of one family that have trained, and what came of it."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        model_type, warm = config.model.base, WarmModel()
        save_tiny(model_type, folder / "models" / model_type)
        for site in SITES:
            write_records(folder / "data" / site, site)
        write_records(folder / "held-out", "held-out")
        house = House(folder, RunFolder.create(folder / "runs", config))
        bench = Bench(folder, warm)
        for site in SITES:
            house.admit(site, make_trainer(folder, site, model_type, warm))  # type: ignore[arg-type]
        self.base = bench.base(config)
        self.digest = self.base.frozen_digest()
        self.last = federate(house.folder, house.exchange(), len(SITES), bench)  # type: ignore[arg-type]
        self.losses = bench.losses
        self.adapter = house.folder.path / "adapter"
        lines = Metrics(house.folder.path / "metrics.jsonl").read()
        self.outcomes = {
            (x["round"], x["site"]): x["outcome"] for x in lines if x["event"] == "site"
        }


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "unquantized"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_family_learns_in_two_rounds_of_two_sites_and_its_base_stays_the_same(
    tmp_path: Path, model_type: str, nf4: bool
) -> None:
    done = Federation(tmp_path, settings_of(model_type, nf4))
    assert done.outcomes == {(round_, site): "used" for round_ in (1, 2) for site in SITES}
    assert done.last.origin.family == ("seq2seq" if model_type in SEQ2SEQ else "causal")
    assert rank_of(done.last.residual) > 0
    assert done.losses[-1] < done.losses[0]
    assert done.base.frozen_digest() == done.digest
    if not nf4:
        check_export(tmp_path, done.adapter, done.base, done.last)


def test_adapters_on_a_weight_that_two_layers_share_are_not_merged_into_it(tmp_path: Path) -> None:
    targets = ("in_proj", "shared_transformer.self_attn.q_proj")
    done = Federation(tmp_path, settings_of("zamba2", nf4=False, targets=targets))
    assert done.losses[-1] < done.losses[0]
    with pytest.raises(
        ModelError, match=r"layers\.1\..*q_proj and .*layers\.3\..*q_proj share one"
    ):
        merge(done.base.folder, done.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def check_export(folder: Path, adapter: Path, base: BaseModel, last: Checkpoint) -> None:
    """The merged checkpoint has the loss of base, adapter and residual, and the base's settings."""
    merge(base.folder, adapter, folder / "merged")
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (base.folder, folder / "merged")
    )
    for name in ARCHITECTURES[before["model_type"]].settings:
        assert after[name] == before[name]
    alone = BaseModel.load(
        folder / "merged",
        ModelConfig(base="merged", quantization="none", compute_dtype="float32"),
        LoraConfig(rank=1),
    )
    config = settings_of("merged", nf4=False).training
    examples: list[Tokenized] = tokenize(
        load_records(folder / "held-out"), base.tokenizer, base.family, 64
    )
    ours = mean_loss(base, last.adapter, examples, config, last.residual)
    untouched = initial_adapter(alone.spec(), 1, alone.given())
    assert mean_loss(alone, untouched, examples, config) == pytest.approx(ours, rel=1e-3)
