"""The span test: it reads the tokens out of a plain update, and nothing out of a protected one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attacks.setting import OPEN, PRIVATE, SUM, Setting
from attacks.span import distances, recover_tokens
from attacks.trials import Recovered, try_span
from tests.attacks.conftest import make_rows
from tests.tiny_models import WORDS

FOR_EACH = {"a": WORDS[:18], "b": WORDS[18:36], "c": WORDS[36:54]}


@pytest.fixture(scope="module")
def recovered(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Recovered:
    """Eighteen words at each site: fewer than the first layer's 24 rows; 54 of all are more."""
    setting = Setting(
        folder=tmp_path_factory.mktemp("span"), models=models, base="tiny-llama", epsilon=1.0
    )
    records = {site: make_rows(site, 12, 1, words) for site, words in FOR_EACH.items()}
    return try_span(setting, records)


def test_a_plain_update_gives_back_every_token_and_no_other(recovered: Recovered) -> None:
    assert recovered.tokens > 15
    assert recovered.shares[OPEN] == 1
    assert recovered.wrong[OPEN] == 0


@pytest.mark.parametrize("protection", [SUM, PRIVATE])
def test_a_masked_update_their_sum_and_a_noised_one_give_back_none(
    recovered: Recovered, protection: str
) -> None:
    assert recovered.shares[protection] == 0


def test_a_sum_of_few_tokens_under_a_large_rank_gives_them_back_all_the_same(
    setting: Setting,
) -> None:
    """What secure aggregation does not do, as docs/attacks.md says."""
    words = WORDS[:18]
    records = {site: make_rows(site, 12, 1, words) for site in FOR_EACH}
    assert try_span(setting, records).shares[SUM] == 1


def test_a_combination_of_inputs_has_them_in_its_span() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((100, 40)).astype(np.float32)
    rows = generator.standard_normal((8, 5)).astype(np.float32) @ inputs[10:15]
    assert recover_tokens(distances(rows, inputs)) == set(range(10, 15))
    # With more of them than rows no single one is inside.
    rows = generator.standard_normal((8, 12)).astype(np.float32) @ inputs[10:22]
    assert recover_tokens(distances(rows, inputs)) == set()
