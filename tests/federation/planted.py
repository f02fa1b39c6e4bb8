"""Planted patients: marks in a site's records, and a search for them in every encoding."""

from __future__ import annotations

import base64
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.tiny_models import VOCABULARY

WORDS = "w7 w31 w12 w5 w58 w23 w44 w2"
"""Words that the tiny model knows, in an order that nothing else has."""
MARKS = {
    "prompt": "Qxprompt-Ärztin-7f3a",
    "completion": 'Qxanswer "K-91" 5c2e',
    "patient": "Qxpatient-8841-b6",
    "column": "Qxcolumn-9d07",
    "words": WORDS,
}


def plant(folder: Path) -> None:
    """Add three marked records of one patient to a site's folder."""
    rows = [
        {
            "prompt": f"{MARKS['prompt']} {WORDS}",
            "completion": f"{MARKS['completion']} w9",
            "patient_id": MARKS["patient"],
            "ward": MARKS["column"],
        }
    ] * 3
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "planted.jsonl").write_text(text, encoding="utf-8")


def encode_mark(mark: str) -> dict[str, bytes]:
    """What a mark may look like in a file, by the name of the encoding."""
    raw = mark.encode()
    found = {
        "utf-8": raw,
        "utf-16": mark.encode("utf-16-le"),
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "json": json.dumps(mark)[1:-1].encode(),
        "json in json": json.dumps(json.dumps(mark)[1:-1])[1:-1].encode(),
        "url": urllib.parse.quote(mark).encode(),
        "repr": repr(raw)[2:-1].encode(),
    }
    for shift in range(3):
        # The first and last characters depend on what stands around the mark.
        whole = base64.b64encode(b"\0" * shift + raw + b"\0" * (-(shift + len(raw)) % 3))
        found[f"base64 {shift}"] = whole[4 if shift else 0 : -4]
    if mark == WORDS:
        tokens = [VOCABULARY[word] for word in mark.split()]
        found["tokens"] = ", ".join(map(str, tokens)).encode()
        for kind in ("<i4", "<i8", "<u2"):
            found[f"tokens {kind}"] = np.array(tokens, dtype=kind).tobytes()
    return found


@dataclass(frozen=True)
class Find:
    """A mark that was found."""

    where: str
    mark: str
    encoding: str


def search(pieces: Mapping[str, bytes]) -> Iterator[Find]:
    """Every mark in every encoding that is in some bytes, which have a name."""
    for name, mark in MARKS.items():
        for encoding, pattern in encode_mark(mark).items():
            for where, data in pieces.items():
                if pattern in data:
                    yield Find(where, name, encoding)


def read_files(*folders: Path) -> dict[str, bytes]:
    """Every file below some folders, by its path."""
    return {
        str(path): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
