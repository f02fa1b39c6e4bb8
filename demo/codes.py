"""Codes: the ICD-10-CM task, as texts with a chapter and a category, near-duplicates grouped.

`simple-icd-10-cm` carries the classification (public domain). The 17 chapters used are the
body systems: without symptoms, injuries, external causes and the chapters U and Z.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

# Short, each starting with another word: the option is told by its first token or two.
CHAPTERS = {
    "1": "Infectious diseases",
    "2": "Neoplasms",
    "3": "Blood and immune system",
    "4": "Endocrine and metabolic",
    "5": "Mental disorders",
    "6": "Nervous system",
    "7": "Eye",
    "8": "Ear",
    "9": "Circulatory system",
    "10": "Respiratory system",
    "11": "Digestive system",
    "12": "Skin",
    "13": "Musculoskeletal system",
    "14": "Genitourinary system",
    "15": "Pregnancy and childbirth",
    "16": "Newborn",
    "17": "Congenital malformations",
}
LONGEST_TEXT = 100

# What tells near-duplicates apart: side, encounter, trimester, fetus, kind, joint.
_DETAIL = re.compile(
    r"""\b(?:
    left|right|bilateral|unilateral|side|sided|dominant|non-?dominant|upper|lower
    |(?:initial|subsequent)\s+encounter.*|sequela|with\s+(?:routine|delayed)\s+healing
    |with\s+(?:mal|non)union|first|second|third|fourth|trimester|fetus|antepartum
    |type|stage|grade|level|category|i{1,3}|iv|\d+\w*
    |unspecified|other|specified|nos|nec|not\s+elsewhere\s+classified|site|sites|multiple
    |eye|eyes|ear|ears|eyelid|eyelids|breast|limb|leg|arm|forearm|thigh|shoulder|elbow|wrist
    |hand|hands|finger|fingers|hip|knee|ankle|foot|toe|toes|joint|joints|humerus|radius|ulna
    |femur|tibia|fibula|pelvis|vertebra|vertebrae|(?:cervi|occipi|thora|lumb|sacr)\w*
    |quadrant|mild|moderate|severe|acute|chronic|recurrent|intractable|without|with|and|or|of
    |the|in|to|due|by|region|part
    )\b""",
    re.VERBOSE,
)
# Inclusion terms that point at other codes instead of naming a disease.
_REFERENCE = re.compile(r"[A-Z]\d[0-9A-Z](\.|\b)|^(Any|Conditions?|Codes?)\b|classifi|listed")


@dataclass(frozen=True)
class Text:
    """One wording of one code.

    Attributes:
        code: the ICD-10-CM code it belongs to.
        text: the wording.
        chapter: the body system, a value of `CHAPTERS`.
        category: body system and the code's category, such as `Nervous system, G47`.
        group: what is left of the text without the details that near-duplicates differ in.
    """

    code: str
    text: str
    chapter: str
    category: str
    group: str


def normalise(text: str) -> str:
    """The text without side, encounter, trimester, kind, joint, filler words, order.

    Two codes with an equal normal form are near-duplicates: one of them in training would
    give away the other.
    """
    lower = text.lower().replace("-", " ")
    words = re.findall(r"[^\W_]+", _DETAIL.sub(" ", lower)) or re.findall(r"[^\W_]+", lower)
    return " ".join(sorted(set(words)))


def read_codes() -> list[Text]:
    """Every leaf code of the 17 chapters, in the classification's order."""
    icd = _classification()
    return [
        _text(number, code, icd.get_description(code))
        for number in CHAPTERS
        for code in _descendants(number)
        if icd.is_leaf(code) and len(icd.get_description(code)) <= LONGEST_TEXT
    ]


def read_wordings() -> list[Text]:
    """Every inclusion term that names a disease, in the classification's order."""
    icd = _classification()
    return [
        _text(number, code, term)
        for number in CHAPTERS
        for code in _descendants(number)
        if icd.is_category_or_subcategory(code)
        for term in icd.get_inclusion_term(code)
        if len(term) <= LONGEST_TEXT and not _REFERENCE.search(term)
    ]


def categories() -> list[str]:
    """Every category of the 17 chapters as `body system, code`, in order."""
    return [
        f"{chapter}, {code}"
        for number, chapter in CHAPTERS.items()
        for code in _descendants(number)
        if _classification().is_category(code)
    ]


def group(texts: list[Text]) -> dict[str, list[Text]]:
    """Texts by normal form, without those whose normal form occurs in two chapters."""
    groups: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        groups[text.group].append(text)
    return {key: found for key, found in groups.items() if len({t.chapter for t in found}) == 1}


def _descendants(number: str) -> list[str]:
    """Codes of a chapter; a block that is one category has the category's code, given once."""
    return list(dict.fromkeys(_classification().get_descendants(number)))


@functools.cache
def _classification() -> Any:
    """The package, which reads its files for 2 s when it is imported: only where it is asked."""
    with warnings.catch_warnings():
        # It does so by a function that newer Pythons have deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import simple_icd_10_cm
    return simple_icd_10_cm


def _text(number: str, code: str, text: str) -> Text:
    chapter = CHAPTERS[number]
    return Text(code, text, chapter, f"{chapter}, {code[:3]}", normalise(text))
