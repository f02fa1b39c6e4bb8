"""Exposure and membership: long training leaves secrets and members in an update."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from attacks.exposure import exposure
from attacks.membership import separate
from attacks.setting import OPEN, PRIVATE, Setting
from attacks.trials import Remembered, Secret, try_memory
from tests.attacks.conftest import EPSILON, make_rows


@pytest.fixture(scope="module")
def remembered(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Remembered:
    folder = tmp_path_factory.mktemp("memory")
    setting = Setting(folder=folder, models=models, base="tiny-llama", epsilon=EPSILON)
    secrets = []
    for number in range(3):
        secret, *others = make_rows(f"secret{number}-", 256, 2)
        candidates = [str(other["completion"]) for other in others]
        secrets.append(Secret(row=secret, candidates=candidates))
    return try_memory(
        setting,
        {site: make_rows(site, 60, 3) for site in "abc"},
        make_rows("out", 200, 4),
        secrets,
        training={"steps": 60, "batch_examples": 12, "learning_rate": 1e-2},
        repeats=4,
    )


@pytest.mark.slow
def test_plain_updates_expose_the_secrets_and_noised_ones_do_not(remembered: Remembered) -> None:
    assert remembered.most == 8
    assert np.mean(remembered.exposures[OPEN]) > 6
    assert np.mean(remembered.exposures[PRIVATE]) < 4


@pytest.mark.slow
def test_plain_updates_tell_members_from_others_and_noised_ones_do_not(
    remembered: Remembered,
) -> None:
    plain, private = (remembered.separations[name] for name in (OPEN, PRIVATE))
    assert plain.auc > 0.9
    assert plain.found > 0.6
    assert private.auc < 0.65
    assert private.found < 0.3


def test_exposure_is_the_number_of_halvings_that_the_rank_saves() -> None:
    assert exposure(0.5, [1.0] * 255) == 8
    assert exposure(2.0, [1.0] * 255) == 0
    assert exposure(1.5, [1.0, 2.0, 3.0]) == math.log2(4) - math.log2(2)
    # A model that tells nothing apart exposes nothing.
    assert exposure(1.0, [1.0] * 255) == 0


def test_a_separation_is_counted_by_hand() -> None:
    apart = separate(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    assert (apart.auc, apart.found) == (1, 1)
    mixed = separate(np.array([1.0, 3.0]), np.array([2.0, 0.0]))
    assert (mixed.auc, mixed.found) == (0.75, 0.5)
    same = separate(np.zeros(5), np.zeros(5))
    assert (same.auc, same.found) == (0.5, 0)
    assert (same.curve[0], same.curve[-1]) == ((0, 0), (1, 1))
