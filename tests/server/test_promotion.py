"""What a finished run must have kept to take the place of what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqlora.errors import FederationError
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.promotion import check_measurable, check_promotion
from tests.server.conftest import run_config
from tests.server.test_tasks import scores


def make_run(
    path: Path,
    *,
    a: float = 0.8,
    b: float | None = 0.9,
    answer: float = 0.9,
    asked: bool = True,
    **bounds: float,
) -> RunFolder:
    """A run of task b on one of task a, which had 0.8 and 0.9 on plain questions, as the base."""
    continual: dict[str, object] = {"task": "b", "earlier": ["a"], "figure": "chapter", **bounds}
    config = run_config(
        sections={"continual": continual, "evaluation": {"enabled": True, "probe": True}}
    )
    folder = RunFolder.create(path, config)
    untuned = scores(0.1, 0.1, 0.9)
    if not asked:
        del untuned["general"]
    learned = [{"run": "run-a", "task": "a", "scores": scores(0.8, 0.3, 0.9)}]
    folder.write_json("tasks.json", {"untuned": untuned, "learned": learned})
    metrics = Metrics(folder.path / "metrics.jsonl")
    metrics.append("evaluation", round=2, scores=scores(a, b, answer), seconds=1.0)
    return folder


def test_a_result_within_its_bounds_is_promoted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, a=0.75, answer=0.85, max_forgetting=0.06, max_general_loss=0.06)
    check_measurable(folder, folder.config())
    check_promotion(folder, folder.config())


def test_the_task_that_was_forgotten_is_named_with_how_much(tmp_path: Path) -> None:
    folder = make_run(tmp_path, a=0.7, max_forgetting=0.05)
    with pytest.raises(
        FederationError, match=r"b is not promoted: chapter on task a fell by 0.100 "
    ):
        check_promotion(folder, folder.config())
    free = make_run(tmp_path, a=0.0)
    check_promotion(free, free.config())


def test_a_model_that_lost_its_language_is_not_promoted(tmp_path: Path) -> None:
    folder = make_run(tmp_path, answer=0.6, max_general_loss=0.1)
    with pytest.raises(FederationError, match=r"plain questions fell by 0.300 from the untuned"):
        check_promotion(folder, folder.config())


@pytest.mark.parametrize("bound", ["max_forgetting", "max_general_loss"])
def test_a_bound_without_a_file_for_each_task_is_refused(tmp_path: Path, bound: str) -> None:
    folder = make_run(tmp_path, b=None, **{bound: 0.1})
    with pytest.raises(FederationError, match=r"need the held-out files a.jsonl, b.jsonl and chap"):
        check_measurable(folder, folder.config())
    check_measurable(make_run(tmp_path, b=None), make_run(tmp_path, b=None).config())


def test_a_bound_on_plain_questions_is_refused_where_the_base_was_not_asked(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path, asked=False, max_general_loss=0.1)
    with pytest.raises(FederationError, match=r"which task a did not score on plain questions"):
        check_measurable(folder, folder.config())
