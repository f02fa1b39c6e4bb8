"""Near-duplicates have one normal form, different diseases have not."""

from __future__ import annotations

import itertools

import pytest

from demo.codes import CHAPTERS, categories, group, normalise, read_codes, read_wordings


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Corneal ulcer, left eye", "Corneal ulcer, bilateral"),
        ("Corneal ulcer, left eye", "Corneal ulcer, unspecified eye"),
        ("Fracture of hip, initial encounter for closed fracture", "Fracture of hip, sequela"),
        ("Obesity in pregnancy, first trimester", "Obesity in pregnancy, third trimester"),
        ("Type 1 diabetes mellitus with coma", "Type 2 diabetes mellitus with coma"),
        ("Effusion, right knee", "Effusion, unspecified ankle"),
        ("Gout, fetus 1", "Gout, not elsewhere classified"),
    ],
)
def test_near_duplicates_have_one_normal_form(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_other_diseases_and_texts_of_filler_words_only_keep_their_own() -> None:
    assert normalise("Narcolepsy with cataplexy") != normalise("Narcolepsy without paralysis")
    assert normalise("Multiple sites") != normalise("Other specified")
    assert normalise("Multiple sites")


def test_every_text_belongs_to_its_chapter_and_category() -> None:
    codes = {text.code: text for text in read_codes()}
    assert codes["G47.411"].text == "Narcolepsy with cataplexy"
    assert codes["G47.411"].category == "Nervous system, G47"
    assert {text.chapter for text in codes.values()} == set(CHAPTERS.values())
    assert {text.category for text in codes.values()} <= set(categories())


def test_no_option_is_the_start_of_another() -> None:
    for options in (list(CHAPTERS.values()), categories()):
        assert not any(b.startswith(a) for a, b in itertools.pairwise(sorted(options)))


def test_a_normal_form_of_two_chapters_is_left_out() -> None:
    texts = read_codes()
    kept = group(texts)
    assert all(len({text.chapter for text in members}) == 1 for members in kept.values())
    assert sum(map(len, kept.values())) < len(texts)


def test_wordings_that_point_at_other_codes_are_left_out() -> None:
    wordings = [text.text for text in read_wordings()]
    assert "Plantar fasciitis" in wordings
    assert not any(text.startswith(("Any ", "Conditions ", "Codes ")) for text in wordings)
