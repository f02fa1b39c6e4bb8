"""The page of the attacks, from figures made up here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attacks.membership import separate
from attacks.page import Findings, render_findings, render_text
from attacks.setting import OPEN, PRIVATE, PROTECTIONS, SUM
from attacks.trials import Audited, Recovered, Remembered


@pytest.fixture
def found() -> Findings:
    generator = np.random.default_rng(0)
    return Findings(
        base="large-model",
        small="small-model",
        epsilon=2.0,
        delta=1e-7,
        recovered=Recovered(
            tokens=91,
            texts=8,
            vocabulary=49152,
            shares={OPEN: 1.0, SUM: 0.03, PRIVATE: 0.0},
            wrong=dict.fromkeys(PROTECTIONS, 0),
            distances={name: np.sort(generator.random(91)) for name in PROTECTIONS},
            usual=0.25,
        ),
        remembered=Remembered(
            members=64,
            others=100,
            exposures={name: [7.0, 6.0] for name in PROTECTIONS},
            most=7.0,
            separations={
                name: separate(generator.random(64) + 1, generator.random(100))
                for name in PROTECTIONS
            },
        ),
        audited=Audited(canaries=1000, bounds={OPEN: 4.7, SUM: 1.6, PRIVATE: 0.31}, most=4.7),
    )


def test_table_and_page_have_every_figure_and_need_no_network(found: Findings) -> None:
    text, page = render_text(found), render_findings(found)
    for cell in ("100%", "3%", "6.5", "1.00", "4.70", "1.60", "0.31"):
        assert f" {cell} |" in text
        assert f">{cell}<" in page
    assert page.count("<figure>") == 4
    assert "http://" not in page
    assert "https://" not in page
    assert "names 25%" in page


def test_a_bound_above_the_promise_breaks_it(found: Findings) -> None:
    assert not found.broken
    bounds = {**found.audited.bounds, PRIVATE: 2.1}
    broken = replace(found, audited=replace(found.audited, bounds=bounds))
    assert broken.broken
    assert "the promise is broken" in render_findings(broken)
