"""Tasks in turn: real trainers and a real evaluator of a tiny model, messages as function calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.supercore.task_identity import TaskIdentity

from client.ledger import make_ledger
from client.policy import Limits, Models, Policy, Privacy
from client.worker import SiteWorker
from fedqlora import VERSION
from fedqlora.adapter import Adapter, AdapterSpec, rank_of
from fedqlora.audit import AuditLog
from fedqlora.config import RunConfig, validate
from fedqlora.continual import earlier_rows
from fedqlora.engine.base import base_digest
from fedqlora.engine.service import Identity, Service, listen
from fedqlora.engine.warm import WarmModel
from fedqlora.errors import CheckpointError, ConfigError, FederationError
from fedqlora.privacy.receipts import Receipt
from server.centre_log import CentreLog
from server.checkpoint import Checkpoint, RunFolder
from server.continuation import continue_from
from server.evaluation import NAME, Evaluator
from server.evaluator import Scorer
from server.exchange import Exchange
from server.history import read_history
from server.rounds import federate
from server.submit import read_scores, write_result
from tests.server.conftest import COORDINATOR, FunctionGrid, site_key
from tests.tiny_models import save_llama

SITES = ("a", "b")
CENTRE = Ed25519PrivateKey.from_private_bytes(b"e" * 32)
ANSWERS = {"first": (20, 30), "second": (40, 50)}


def rows(task: str, name: str) -> list[dict[str, str]]:
    """Two tasks of the same prompts with other answers: to learn one is to forget the other."""
    low, _ = ANSWERS[task]
    return [
        {
            "prompt": f"w{i % 10} w{(i * 3) % 10}",
            "completion": f"w{low + i % 10}",
            "answer": f"w{low + i % 10}",
            "patient_id": f"{task}-{name}{i // 2}",
        }
        for i in range(40)
    ]


def write(path: Path, found: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@dataclass
class Clinic:
    """Two sites and a centre whose folders outlive their processes."""

    folder: Path
    policy: Policy
    warm: WarmModel

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def set_task(self, task: str, earlier: str | None = None) -> None:
        for site in SITES:
            write(self.folder / site / "records.jsonl", rows(task, site))
            if earlier:
                write(self.folder / site / "earlier" / f"{earlier}.jsonl", rows(earlier, site))

    def trainer(self, site: str) -> Service:
        state = self.folder / "state" / site
        state.mkdir(parents=True, exist_ok=True)
        key = site_key(site)
        audit = AuditLog(state / "audit.jsonl", key)
        trainer = SiteWorker(
            site=site,
            data=self.folder / site,
            models=self.folder / "models",
            policy=self.policy,
            audit=audit,
            state=state,
            key=key,
            peers={},
            warm=self.warm,
        )
        if not audit.head.number:
            audit.append("started")
        identity = Identity(name=site, key=key, coordinator=COORDINATOR.public_key())
        return Service(identity, state / "window", trainer, audit=audit)

    def run(self, folder: RunFolder) -> Checkpoint:
        """What server/app.py does with a run folder."""
        nodes = {n: self.trainer(site).exchange for n, site in enumerate(SITES, start=1)}
        newest = folder.latest()
        exchange = Exchange(
            FunctionGrid(nodes),  # type: ignore[arg-type]
            COORDINATOR,
            {site: site_key(site).public_key() for site in SITES},
            folder.name,
            newest.issued if newest else 0,
            CentreLog(self.runs, COORDINATOR),
        )
        folder.set_status("running", round=0)
        folder.write_json("versions.json", {"fedqlora": VERSION})
        evaluator = Evaluator(self.folder / "e.sock", CENTRE.public_key(), exchange.sign)
        try:
            end = federate(folder, exchange, len(SITES), evaluator)
        except FederationError as error:
            folder.set_status("failed", error=str(error))
            raise
        folder.set_status("finished", round=end.round)
        return end


@pytest.fixture(autouse=True)
def _task_identity() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    folder = tmp_path_factory.mktemp("clinic")
    digest = base_digest(save_llama(folder / "models" / "tiny-llama"))
    for task in ANSWERS:
        write(folder / "held-out" / f"{task}.jsonl", rows(task, "held")[:10])
    words = [f"w{low + i}" for low, _ in ANSWERS.values() for i in range(10)]
    (folder / "held-out" / "choices.json").write_text(json.dumps({"answer": words}))
    warm = WarmModel()
    scorer = Scorer(folder / "held-out", folder / "models", warm)
    identity = Identity(name=NAME, key=CENTRE, coordinator=COORDINATOR.public_key())
    server = listen(Service(identity, folder / "window", scorer), folder / "e.sock")
    policy = Policy(models=Models(digests=(digest,)), limits=Limits(rank=8))
    yield Clinic(folder, policy, warm)
    server.stop(grace=0).wait()


def configure(task: str, sections: dict[str, dict[str, object]] | None = None) -> RunConfig:
    values: dict[str, Any] = {
        "name": task,
        "model": {"base": "tiny-llama", "compute_dtype": "float32"},
        "lora": {"rank": 4},
        "training": {"steps": 20, "batch_examples": 8, "max_length": 64, "learning_rate": 1e-2},
        "data": {"validation_examples": 0},
        "federation": {"rounds": 2, "wait_seconds": 0.2, "expected_sites": 2},
        "evaluation": {"enabled": True, "every_rounds": 2},
        "codec": {"update": "float32"},
    }
    for name, more in (sections or {}).items():
        values[name] = {**values.get(name, {}), **more}
    return validate(RunConfig, values, "run.toml")


def further(earlier: RunFolder, **sections: dict[str, object]) -> Any:
    def with_chain(chain: Any) -> RunConfig:
        own = {key.split(".")[1]: value for key, value in chain.items()}
        return configure(
            "second", {**sections, "continual": {**sections.get("continual", {}), **own}}
        )

    return continue_from(earlier, with_chain)


@pytest.fixture(scope="module")
def first(clinic: Clinic) -> RunFolder:
    """The first task, learned and finished."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    clinic.set_task("first")
    folder = RunFolder.create(clinic.runs, configure("first"))
    clinic.run(folder)
    return folder


def accuracies(folder: RunFolder, round_: int) -> dict[str, float]:
    scores = read_history(folder).scores[round_]
    return {task: scores[task]["answer"] for task in ANSWERS}


def test_a_further_task_starts_where_the_run_before_ended_and_forgets_without_help(
    clinic: Clinic, first: RunFolder
) -> None:
    clinic.set_task("second")
    end = first.latest()
    assert end is not None
    assert rank_of(end.residual) > 0, "exact_svd keeps a residual, which goes along"
    folder = further(first).create(clinic.runs)
    start = folder.start()
    for name, value in end.adapter.items():
        assert np.array_equal(start.adapter[name], value)
    for name, value in end.residual.items():
        assert np.array_equal(start.residual[name], value)
    config = folder.config()
    assert config.continual.earlier == ("first",)
    assert config.continual.starts_from == first.name
    clinic.run(folder)
    assert accuracies(folder, 0) == accuracies(first, 2)
    assert accuracies(first, 2)["first"] > 0.8
    tasks = read_history(folder).tasks
    assert tasks is not None
    assert tasks.names == ("first", "second")
    assert tasks.matrix[0] == (accuracies(first, 2)["first"], accuracies(first, 2)["second"])
    assert tasks.matrix[1] == (accuracies(folder, 2)["first"], accuracies(folder, 2)["second"])
    assert tasks.matrix[1][1] > 0.8
    assert tasks.forgetting is not None
    assert tasks.forgetting > 0.5
    text = write_result(folder, read_scores(folder))
    assert "| first        |" in text
    assert "before this task" in text
    assert "What was kept of each task" in (folder.path / "report.html").read_text()
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_resumed_further_task_is_an_unbroken_one(clinic: Clinic, first: RunFolder) -> None:
    clinic.set_task("second")
    whole = further(first, continual={"penalty": 0.01}).create(clinic.runs)
    unbroken = clinic.run(whole)
    broken = further(first, continual={"penalty": 0.01}).create(clinic.runs)
    for file in ("config.json", "tasks.json"):
        (broken.path / file).write_bytes((whole.path / file).read_bytes())
    one = whole.path / "rounds" / "0001"
    (broken.path / "rounds" / "0001").mkdir()
    for file in one.iterdir():
        (broken.path / "rounds" / "0001" / file.name).write_bytes(file.read_bytes())
    resumed = clinic.run(broken)
    assert all(np.array_equal(resumed.adapter[n], unbroken.adapter[n]) for n in resumed.adapter)


def product_change(before: Checkpoint, after: Checkpoint, scale: float) -> float:
    """|W - W0| over all layers, adapter and residual together."""

    def products(one: Checkpoint) -> dict[str, Any]:
        found = {}
        for a in (name for name in one.adapter if ".lora_A." in name):
            b = a.replace("lora_A", "lora_B")
            found[a] = scale * one.adapter[b] @ one.adapter[a]
            if one.residual:
                found[a] = found[a] + one.residual[b] @ one.residual[a]
        return found

    old, new = products(before), products(after)
    return float(np.sqrt(sum(np.square(new[name] - old[name]).sum() for name in old)))


def test_the_penalty_holds_the_products_of_a_whole_run_to_the_tasks_start(
    clinic: Clinic, first: RunFolder
) -> None:
    clinic.set_task("second")
    scale = configure("second").lora.scale
    changes = []
    for penalty in (0.0, 0.1):
        folder = further(first, continual={"penalty": penalty}).create(clinic.runs)
        end = clinic.run(folder)
        changes.append(product_change(folder.start(), end, scale))
    assert changes[1] < 0.8 * changes[0]


def test_replay_keeps_what_plain_training_forgets(clinic: Clinic, first: RunFolder) -> None:
    clinic.set_task("second", earlier="first")
    folder = further(first, continual={"replay_fraction": 1.0}).create(clinic.runs)
    clinic.run(folder)
    tasks = read_history(folder).tasks
    assert tasks is not None
    # Both answers to one prompt cannot be right: what plain training loses is shared here.
    plain = further(first).create(clinic.runs)
    clinic.run(plain)
    assert tasks.matrix[1][0] > accuracies(plain, 2)["first"] + 0.15


@pytest.mark.parametrize("method", ["ffa", "fedavg"])
def test_an_orthogonal_task_leaves_what_was_frozen_and_its_rows_alone(
    clinic: Clinic, first: RunFolder, method: str
) -> None:
    clinic.set_task("second")
    folder = further(first, continual={"orthogonal": True}, aggregation={"method": method}).create(
        clinic.runs
    )
    start = folder.start()
    assert folder.config().continual.frozen_rank == rank_of(start.residual) > 4
    assert not any(value.any() for name, value in start.adapter.items() if ".lora_B." in name)
    end = clinic.run(folder)
    assert accuracies(folder, 0) == accuracies(first, 2)
    for name, value in start.residual.items():
        assert np.array_equal(end.residual[name], value)
    assert any(value.any() for name, value in end.adapter.items() if ".lora_B." in name)
    assert overlap(end.adapter, end.residual) < 1e-4


def overlap(adapter: Adapter, frozen: Adapter) -> float:
    shares = [0.0]
    for name, value in adapter.items():
        rows_ = earlier_rows(frozen, name) if ".lora_A." in name else None
        if rows_ is not None:
            shares.append(float(np.abs(value @ rows_.T).max() / np.linalg.norm(value)))
    return max(shares)


def test_a_task_that_forgets_more_than_its_bound_is_not_promoted(
    clinic: Clinic, first: RunFolder
) -> None:
    clinic.set_task("second")
    folder = further(first, continual={"max_forgetting": 0.05}).create(clinic.runs)
    with pytest.raises(FederationError, match=r"task second is not promoted: answer on task first"):
        clinic.run(folder)
    assert not (folder.path / "adapter").exists()
    assert folder.latest() is not None, "its checkpoints stay"
    with pytest.raises(CheckpointError, match=r"has not finished \(it is failed\)"):
        further(folder)
    lenient = further(first, continual={"max_forgetting": 1.0}).create(clinic.runs)
    clinic.run(lenient)
    assert (lenient.path / "adapter").is_dir()


def test_a_bound_without_a_held_out_file_ends_before_the_first_round(
    clinic: Clinic, first: RunFolder
) -> None:
    clinic.set_task("second")
    sections = {"task": "third", "max_forgetting": 0.05}
    folder = further(first, continual=sections).create(clinic.runs)
    with pytest.raises(FederationError, match=r"held-out files first.jsonl, third.jsonl and"):
        clinic.run(folder)
    latest = folder.latest()
    assert latest is not None
    assert latest.round == 0


def test_an_empty_task_ends_before_the_first_round_with_the_site_named(
    clinic: Clinic, first: RunFolder
) -> None:
    for site in SITES:
        (clinic.folder / site / "records.jsonl").write_text("")
    folder = further(first).create(clinic.runs)
    with pytest.raises(FederationError, match=r"0 of at least 2 sites are usable .*DataError"):
        clinic.run(folder)
    clinic.set_task("second")


def test_a_site_with_another_base_takes_no_part_in_a_further_task(
    clinic: Clinic, first: RunFolder
) -> None:
    clinic.set_task("second")
    folder = further(first).create(clinic.runs)
    start = folder.start()
    state = json.loads((folder.path / "rounds" / "0000" / "state.json").read_text())
    state["origin"]["base_digest"] = "0" * 64
    (folder.path / "rounds" / "0000" / "state.json").write_text(json.dumps(state))
    assert AdapterSpec.of(start.adapter) == AdapterSpec.of(folder.start().adapter)
    with pytest.raises(FederationError, match=r"its base model or adapter differs from the run's"):
        clinic.run(folder)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"lora": {"rank": 8, "alpha": 32.0}}, r"lora.rank is 8 and was 4 in .*set it to that"),
        ({"lora": {"rank": 4, "alpha": 8.0}}, r"so the scale, is 2.0 and was 4.0"),
        ({"lora": {"rank": 4, "targets": ["q_proj"]}}, r"lora.targets is q_proj and was auto"),
        (
            {"model": {"base": "tiny-llama", "quantization": "none"}},
            r"model.quantization is none and was nf4",
        ),
        ({"model": {"base": "other"}}, r"model.base is other and was tiny-llama"),
        ({"aggregation": {"residual_rank": 1}}, r"the new run keeps 1; raise aggregation.res"),
        ({"continual": {"task": "first"}}, r"names a task that was learned before"),
    ],
)
def test_another_adapter_is_refused_in_one_sentence_and_leaves_nothing(
    clinic: Clinic, first: RunFolder, sections: dict[str, dict[str, object]], sentence: str
) -> None:
    before = set(clinic.runs.iterdir())
    with pytest.raises(ConfigError, match=sentence) as caught:
        further(first, **sections)
    assert "\n" not in str(caught.value)
    assert set(clinic.runs.iterdir()) == before


def test_a_run_of_another_version_or_an_unfinished_one_is_not_continued(
    clinic: Clinic, first: RunFolder
) -> None:
    unfinished = RunFolder.create(clinic.runs, configure("first"))
    with pytest.raises(CheckpointError, match=r"has not finished \(it is new\); finish it by"):
        further(unfinished)
    versions = first.read_json("versions.json")
    first.write_json("versions.json", {"fedqlora": "0.0.1"})
    try:
        with pytest.raises(CheckpointError, match=rf"of version 0.0.1 and this is {VERSION}"):
            further(first)
    finally:
        first.write_json("versions.json", versions)


def test_two_private_tasks_of_one_cohort_add_up_in_the_ledger_replayed_records_included(
    tmp_path: Path, clinic: Clinic
) -> None:
    digests = clinic.policy.models.digests
    private = Clinic(
        tmp_path,
        Policy(
            models=Models(digests=digests),
            limits=Limits(rank=8),
            privacy=Privacy(unit="patient", epsilon=20.0, delta=0.01),
        ),
        clinic.warm,
    )
    (tmp_path / "models").symlink_to(clinic.folder / "models")
    (tmp_path / "e.sock").symlink_to(clinic.folder / "e.sock")
    for site in SITES:
        state = tmp_path / "state" / site
        state.mkdir(parents=True)
        make_ledger(site, state, site_key(site))
    sections: dict[str, dict[str, object]] = {
        "privacy": {"unit": "patient", "epsilon": 4.0, "delta": 0.01},
        "training": {"packing": False, "steps": 2, "batch_examples": 4},
        "data": {"validation_fraction": 0},
        "aggregation": {"method": "fedavg", "weighting": "uniform"},
    }
    private.set_task("first")
    start = RunFolder.create(private.runs, configure("first", sections))
    private.run(start)
    private.set_task("second", earlier="first")
    folder = further(start, **sections, continual={"replay_fraction": 0.5}).create(private.runs)
    private.run(folder)
    one, two = (read_receipts(tmp_path / "state" / "a" / "receipts.jsonl", run.name)[-1]
                for run in (start, folder))  # fmt: skip
    assert one.epsilon_cohort == pytest.approx(one.epsilon_run)
    assert two.epsilon_run <= 4.0
    assert two.epsilon_cohort > 1.2 * two.epsilon_run, (
        "the first task's patients were charged before"
    )
    # Twenty new patients, and the earlier ones that were drawn: they are units of this run too.
    assert two.sampling_rate < one.sampling_rate


def read_receipts(path: Path, run: str) -> list[Receipt]:
    lines = [json.loads(line)["receipt"] for line in path.read_text().splitlines()]
    return [
        Receipt(**{**line, "cohort_spent": tuple(map(tuple, line["cohort_spent"]))})
        for line in lines
        if line["run"] == run
    ]
