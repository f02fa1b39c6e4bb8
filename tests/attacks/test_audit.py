"""One-run auditing: a lower bound above the promise fails the build."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attacks.audit import lower_bound, refuted_epsilon, right_guesses_probability, score_canaries
from attacks.setting import OPEN, PRIVATE, Setting
from attacks.sites import Sites
from attacks.texts import read_rows, text_gradients
from attacks.trials import audit_delta, try_audit
from fedqlora.engine.dp import train_privately
from fedqlora.privacy.accountant import calibrate_noise
from tests.attacks.conftest import EPSILON, make_rows

CANARIES = 800
DELTA = 1e-7
Mechanism = Callable[..., float]


def canaries(site: str = "a", count: int = CANARIES) -> list[dict[str, object]]:
    return [dict(row) for row in make_rows(site, count, 5, longest=(3, 5))]


@pytest.mark.slow
def test_no_lower_bound_of_a_private_round_is_above_its_epsilon(setting: Setting) -> None:
    audited = try_audit(setting, canaries(), {site: canaries(site) for site in "bc"})
    assert audited.bounds[OPEN] > 3 * EPSILON, "an attack that finds nothing proves nothing"
    assert audited.bounds[PRIVATE] <= EPSILON


@pytest.fixture(scope="module")
def mechanism(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Mechanism:
    """Audits the engine's private training: noise over clip norm, rate, steps -> bound."""
    folder = tmp_path_factory.mktemp("mechanism")
    setting = Setting(folder=folder, models=models, base="tiny-llama", epsilon=EPSILON)
    sites = Sites(folder / "sites", models, "tiny-llama", {"a": canaries(count=8)})
    config = setting.one_step(PRIVATE, 8)
    base, adapter = sites.base(config), sites.start(config)
    texts = read_rows(base, canaries(), config.training)
    gradients = text_gradients(base, adapter, texts, config.training)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    tosses = np.random.default_rng(7).random(CANARIES) < 0.5
    units = [[text] for text, included in zip(texts, tosses, strict=True) if included]

    def audit(noise: float, rate: float, steps: int, clip: float = 1e-12) -> float:
        trained = train_privately(
            base,
            adapter,
            units,
            config.training.model_copy(update={"steps": steps}),
            clip_norm=clip,
            noise_multiplier=noise,
            sampling_rate=rate,
            round_=1,
            rounds=1,
        )
        known = noise / math.sqrt(steps) / rate
        return audit_delta(trained.delta, tosses, gradients, known, DELTA)

    return audit


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (1.0, 4), (0.5, 4)])
def test_the_noise_that_the_accountant_asks_for_keeps_the_bound_below(
    mechanism: Mechanism, rate: float, steps: int
) -> None:
    noise = calibrate_noise(EPSILON, DELTA, rate, steps)
    assert mechanism(noise, rate, steps) <= EPSILON


@pytest.mark.slow
def test_a_broken_mechanism_is_found_out(mechanism: Mechanism) -> None:
    noise = calibrate_noise(EPSILON, DELTA, 1.0, 1)
    assert mechanism(0.0, 1.0, 1) > 3 * EPSILON, "no noise"
    # Gradients ten times as long as the noise is made for: what forgotten clipping is.
    assert mechanism(noise / 10, 1.0, 1, clip=1e-11) > EPSILON


def test_the_bound_is_that_of_randomised_response() -> None:
    """Pure epsilon: answers that are right with e^eps / (1 + e^eps) refute less, never more."""
    generator = np.random.default_rng(3)
    tosses = generator.random(4000) < 0.5
    right = generator.random(4000) < math.e / (1 + math.e)
    scores = np.where(right, tosses, ~tosses) + generator.random(4000) / 1000
    assert 0.6 < lower_bound(tosses, scores, 0.0) < 1
    assert lower_bound(tosses, generator.random(4000), 0.0) < 0.3


def test_the_probability_by_hand() -> None:
    # Two guesses, epsilon 0: both right in a quarter of all cases.
    assert right_guesses_probability(2, 2, 2, 0.0, 0.0) == pytest.approx(0.25)
    # delta adds 2 m delta times the largest mean over i of what lies up to i below.
    assert right_guesses_probability(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 0.04 * 0.5)
    assert right_guesses_probability(10, 10, 0, 1.0, 0.0) == 1
    assert refuted_epsilon(100, 100, 50, 1e-5, 0.001) == 0
    assert refuted_epsilon(1000, 1000, 1000, 0.0, 0.001) == pytest.approx(4.97, abs=0.01)


def test_scores_are_the_tosses_where_there_is_no_noise() -> None:
    generator = np.random.default_rng(1)
    gradients = generator.standard_normal((20, 50))
    tosses = generator.random(20) < 0.5
    scores = score_canaries(3 * tosses @ gradients, gradients, 0.0)
    assert ((scores > 0) == tosses).all()
