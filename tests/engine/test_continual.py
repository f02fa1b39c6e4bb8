"""What keeps earlier tasks in a site's steps: the penalty, orthogonal rows, replay, the probe."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedqlora.adapter import A_PART, Adapter, AdapterSpec, initial_adapter
from fedqlora.continual import earlier_rows, freeze, orthogonal_start
from fedqlora.engine.data import Record, Tokenized
from fedqlora.engine.model import BaseModel
from fedqlora.engine.penalty import Penalty, ProductPenalty
from fedqlora.engine.probe import QUESTIONS, Question, score_probe
from fedqlora.engine.replay import draw_replay, load_earlier
from fedqlora.engine.train import mean_loss, train
from fedqlora.errors import DataError, UpdateError
from fedqlora.lora_config import LoraConfig
from fedqlora.training_config import TrainingConfig

SPEC = AdapterSpec(
    shapes=(
        ("m.lora_A.weight", (2, 7)),
        ("m.lora_B.weight", (5, 2)),
        ("n.lora_A.weight", (2, 5)),
        ("n.lora_B.weight", (6, 2)),
    )
)
LAYERS = (("m.lora_A.weight", "m.lora_B.weight"), ("n.lora_A.weight", "n.lora_B.weight"))
CONFIG = TrainingConfig(steps=4, batch_examples=4, learning_rate=1e-2, weight_decay=0.1)


def random_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 0.5, shape).astype(np.float32) for n, shape in spec.shapes}


def as_parameters(adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    return {n: torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for n, v in adapter.items()}


def dense(
    parameters: dict[str, torch.nn.Parameter],
    residual: Adapter,
    anchor: Adapter,
    scale: float,
    weight: float,
) -> torch.Tensor:
    """The formula as it is written, on the d_out x d_in matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in LAYERS:
        added = scale * parameters[b] @ parameters[a]
        if residual:
            added = added + torch.tensor(residual[b].astype(np.float64) @ residual[a])
        total = (
            total + (added - torch.tensor(anchor[b].astype(np.float64) @ anchor[a])).square().sum()
        )
    return weight * total


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_penalty_and_its_gradient_are_those_of_the_dense_formula(with_residual: bool) -> None:
    parameters = as_parameters(random_adapter(SPEC, 1))
    residual = random_adapter(SPEC.at_rank(3), 2) if with_residual else {}
    anchor = random_adapter(SPEC.at_rank(4), 3)
    expected = dense(parameters, residual, anchor, scale=1.5, weight=0.3)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    penalty = ProductPenalty(Penalty(weight=0.3, scale=1.5, anchor=anchor), parameters, residual)
    assert penalty.value() == pytest.approx(float(expected.detach()), rel=1e-10)
    penalty.add_gradients()
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient + 1, rtol=1e-9, atol=1e-9)


def test_the_penalty_is_nothing_where_the_task_began() -> None:
    adapter, residual = random_adapter(SPEC, 1), random_adapter(SPEC.at_rank(3), 2)
    anchor = freeze(adapter, residual, 2.0)
    penalty = Penalty(weight=1.0, scale=2.0, anchor=anchor)
    assert abs(ProductPenalty(penalty, as_parameters(adapter), residual).value()) < 1e-4
    assert ProductPenalty(penalty, as_parameters(random_adapter(SPEC, 9)), residual).value() > 1


def moved(before: Adapter, delta: Adapter, scale: float) -> float:
    """How far a round moved the products."""
    total = 0.0
    for a in (name for name in before if A_PART in name):
        b = a.replace("lora_A", "lora_B")
        after = (before[b] + delta[b]) @ (before[a] + delta[a])
        total += float(np.square(scale * (after - before[b] @ before[a])).sum())
    return total


def test_a_larger_penalty_keeps_the_products_nearer_to_where_the_task_began(
    llama: BaseModel, examples: list[Tokenized]
) -> None:
    start = {n: v / 5 for n, v in random_adapter(llama.spec(), 4).items()}
    scale = LoraConfig(rank=4).scale
    distances = []
    for weight in (0.0, 0.1, 10.0):
        penalty = Penalty(weight=weight, scale=scale, anchor=freeze(start, {}, scale))
        result = train(
            llama, start, examples, CONFIG, seed=1, site="a", round_=1, rounds=1, penalty=penalty
        )
        distances.append(moved(start, result.delta, scale))
    plain = train(llama, start, examples, CONFIG, seed=1, site="a", round_=1, rounds=1)
    assert moved(start, plain.delta, scale) == distances[0]
    assert distances[0] > distances[1] > distances[2]


def overlap(adapter: Adapter, frozen: Adapter) -> float:
    """The largest share of a row of A that lies in what earlier tasks read."""
    shares = [0.0]
    for name in adapter:
        rows = earlier_rows(frozen, name) if A_PART in name else None
        if rows is not None:
            inside = np.linalg.norm(adapter[name].astype(np.float64) @ rows.T, axis=1)
            shares.append(float((inside / np.linalg.norm(adapter[name], axis=1)).max()))
    return max(shares)


@pytest.mark.parametrize("method", ["ffa", "fedavg"])
def test_rows_of_a_stay_orthogonal_to_earlier_tasks_through_steps(
    llama: BaseModel, examples: list[Tokenized], method: str
) -> None:
    frozen = freeze(random_adapter(llama.spec(), 5), {}, 0.1)
    start = orthogonal_start(llama.spec(), 1, frozen)
    assert overlap(start, frozen) < 1e-6
    assert overlap(initial_adapter(llama.spec(), 1, {}), frozen) > 0.1
    trained = [name for name in start if method == "fedavg" or A_PART not in name]
    # B starts at zero, and so A moves from the second step on.
    ends = {}
    for orthogonal in (True, False):
        delta = train(
            llama, start, examples, CONFIG, seed=1, site="a", round_=1, rounds=1,
            residual=frozen, trained=trained, orthogonal=orthogonal,
        ).delta  # fmt: skip
        ends[orthogonal] = {name: start[name] + delta.get(name, 0) for name in start}
    assert overlap(ends[True], frozen) < 1e-5
    if method == "fedavg":
        assert overlap(ends[False], frozen) > 1e-3, "without projection the rows turn back"


def test_an_orthogonal_start_is_the_same_function_as_the_end_of_the_task_before(
    llama: BaseModel, examples: list[Tokenized]
) -> None:
    scale = LoraConfig(rank=4).scale
    end = {n: v / 5 for n, v in random_adapter(llama.spec(), 6).items()}
    residual = {n: v / 5 for n, v in random_adapter(llama.spec().at_rank(3), 7).items()}
    frozen = freeze(end, residual, scale)
    start = orthogonal_start(llama.spec(), 1, frozen)
    before = mean_loss(llama, end, examples, CONFIG, residual)
    assert mean_loss(llama, start, examples, CONFIG, frozen) == pytest.approx(before, rel=1e-5)


def test_a_new_task_changes_nothing_for_inputs_that_earlier_tasks_read() -> None:
    earlier = random_adapter(SPEC, 1)
    start = orthogonal_start(SPEC, 1, freeze(earlier, {}, 1.0))
    learned = {**start, "m.lora_B.weight": random_adapter(SPEC, 2)["m.lora_B.weight"]}
    read = earlier["m.lora_A.weight"].T @ np.array([0.3, -1.0])
    assert np.abs(learned["m.lora_B.weight"] @ learned["m.lora_A.weight"] @ read).max() < 1e-6


def test_a_layer_without_directions_left_is_refused_by_name() -> None:
    frozen = random_adapter(SPEC.at_rank(6), 1)
    with pytest.raises(UpdateError, match=r"take 5 of the 5 input .* n.lora_A.*orthogonal = false"):
        orthogonal_start(AdapterSpec(shapes=SPEC.shapes[2:]), 1, frozen)


def make_records(patients: int, each: int = 2) -> list[Record]:
    return [
        Record(messages=None, prompt="q", completion="a", patient=f"id p{patient}", fields={})
        for patient in range(patients)
        for _ in range(each)
    ]


def test_replay_draws_whole_patients_in_the_asked_share_and_the_same_again() -> None:
    records = make_records(5000)
    drawn = draw_replay(records, 0.1, seed=1, site="a")
    assert drawn == draw_replay(records, 0.1, seed=1, site="a")
    # Five standard deviations of 5000 draws at 0.1.
    assert len(drawn) / len(records) == pytest.approx(0.1, abs=0.022)
    assert set(Counter(record.patient for record in drawn).values()) == {2}
    assert drawn != draw_replay(records, 0.1, seed=2, site="a")
    assert drawn != draw_replay(records, 0.1, seed=1, site="b")
    assert draw_replay(records, 1.0, seed=1, site="a") == records


def test_one_patient_more_changes_nobody_elses_draw() -> None:
    """What an account by patient rests on: neighbours differ in one patient's records only."""
    many = make_records(200)
    for left_out in ("id p3", "id p77"):
        fewer = [record for record in many if record.patient != left_out]
        with_all = draw_replay(many, 0.3, 1, "a")
        assert draw_replay(fewer, 0.3, 1, "a") == [r for r in with_all if r.patient != left_out]


def test_a_site_without_earlier_records_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"site a has no .*earlier to replay; put records of"):
        load_earlier(tmp_path, "a")
    with pytest.raises(DataError, match=r"0.01 draws none of its earlier records; raise it"):
        draw_replay(make_records(3), 0.01, seed=1, site="a")


def test_an_earlier_row_without_a_patient_is_nobody_of_the_new_records(tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    row = json.dumps({"prompt": "q", "completion": "a"})
    (tmp_path / "earlier" / "records.jsonl").write_text(row + "\n")
    (record,) = load_earlier(tmp_path, "a")
    assert record.patient.startswith("row earlier records.jsonl:")


def test_every_plain_question_has_three_wrong_answers_and_no_answer_begins_another() -> None:
    assert len(QUESTIONS) == 20
    answers = {answer for one in QUESTIONS for answer in (one.answer, *one.others)}
    assert all(len(one.others) == 3 and one.answer not in one.others for one in QUESTIONS)
    assert len({one.answer for one in QUESTIONS}) == 20
    assert len(answers) == 80, "no answer stands twice"
    assert not any(b.startswith(a) for a, b in itertools.permutations(answers, 2))


def test_the_probe_counts_the_questions_whose_answer_is_likeliest(llama: BaseModel) -> None:
    adapter = initial_adapter(llama.spec(), 1, {})
    # One prompt has one likeliest answer: all other questions with that prompt are wrong.
    asked = tuple(Question("w1 w2", f"w{n}", (f"w{n + 20}",)) for n in range(10, 30))
    scores = [score_probe(llama, adapter, CONFIG, None, (one, *asked)) for one in asked]
    assert {one["examples"] for one in scores} == {21}
    assert sorted(one["answer"] * 21 for one in scores)[-1] == pytest.approx(2)
    assert sum(one["answer"] * 21 > 1.5 for one in scores) == 1
