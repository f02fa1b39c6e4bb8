"""Records: what a site's data files hold, read and checked before anything is trained.

One file has one of four layouts, told by its columns, the first that fits:

    messages                       a chat; the last turn is the assistant's answer
    prompt, completion             plain text and what should follow it
    instruction, [input,] output   joined as instruction, blank line, input, blank line
    text                           everything is learned

and optionally `patient_id`, the privacy unit; without it each row is a patient of its own.
Other columns that hold text are kept as `fields`.

Guarantees: no copy of a record is ever written to disk; no value is guessed into another type
("001" and "NA" stay text); an error names file, line (or row) and column and what was expected
there, never what was found in the text.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fedqlora.errors import DataError

Message = Mapping[str, str]
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
EXPECTED = "`messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`"
NAMELESS = "row "
"""Starts `Record.patient` where a row has no patient_id."""
_OWN = {"messages", "prompt", "completion", "instruction", "input", "output", "text", "patient_id"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One example of one patient.

    Attributes:
        messages: the chat, last turn by the assistant; None for the other layouts.
        prompt: the text before the completion; empty for a chat and for plain `text`.
        completion: the text to learn; empty for a chat.
        patient: the privacy unit, unique over all files of a site.
        fields: other columns that hold text.
    """

    messages: tuple[Message, ...] | None
    prompt: str
    completion: str
    patient: str
    fields: Mapping[str, str]


def load_records(path: Path, *, minimum: int = 2, site: str | None = None) -> list[Record]:
    """Read every record of a file, or of all data files in a folder, in a fixed order.

    Args:
        path: a .jsonl, .csv or .parquet file, or a folder that holds some (others are ignored).
        minimum: fewer records than this are refused.
        site: the site's name, for the message that refuses a site with too little data.

    Raises:
        DataError: nothing to read, a fault in a file, or too few records.
    """
    records = [record for file in list_files(path) for record in _read_file(file)]
    if len(records) < minimum:
        owner = f"site {site} ({path})" if site else str(path)
        raise DataError(
            f"{owner} has too little data: {len(records)} records where at least {minimum} are "
            "needed; add records or leave it out"
        )
    return records


def list_files(path: Path) -> list[Path]:
    """The file itself, or the data files directly inside a folder, by name.

    Raises:
        DataError: there is none.
    """
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.suffix in _ROWS and f.is_file()]
        files = [f for f in files if not f.name.startswith(".")]
        if files:
            return files
        raise DataError(f"{path} holds no .jsonl, .csv or .parquet file; put the data there")
    if not path.is_file():
        raise DataError(f"{path} does not exist; name a data file or a folder of them")
    if path.suffix not in _ROWS:
        raise DataError(f"{path} is not a .jsonl, .csv or .parquet file; convert it to one")
    return [path]


def _read_file(path: Path) -> Iterator[Record]:
    """The records of one file; foreign errors become a DataError here."""
    layout: tuple[str, ...] | None = None
    # `datasets` makes lock files even when it streams; they must not stay in the user's home.
    with tempfile.TemporaryDirectory(prefix="fedqlora-records-") as cache:
        try:
            for number, (place, values) in enumerate(_ROWS[path.suffix](path, cache)):
                if layout is None:
                    layout = _find_layout(path, place, values)
                yield _Row(path, place, values).record(layout, f"{path.name}:{number}")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        except OSError as error:
            reason = error.strerror or "damaged"
            raise DataError(f"{path} cannot be read ({reason}); check the file") from None
        except ValueError:
            raise DataError(f"{path} is not a {path.suffix} file; check how it was made") from None


def _find_layout(path: Path, place: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The first layout whose columns are all there."""
    columns = {name for name, value in values.items() if value is not None}
    for layout in LAYOUTS:
        if columns.issuperset(layout):
            return layout
    for layout in LAYOUTS:
        missing = [name for name in layout if name not in columns]
        if len(missing) < len(layout):
            raise DataError(
                f"{path}, {place}: column `{missing[0]}` is missing or empty beside "
                f"`{next(n for n in layout if n in columns)}`; expected columns {EXPECTED}"
            )
    raise DataError(f"{path}, {place}: no known column; expected columns {EXPECTED}")


@dataclass(frozen=True)
class _Row:
    """One row with its place, for errors that name both."""

    path: Path
    place: str
    values: Mapping[str, Any]

    def record(self, layout: tuple[str, ...], number: str) -> Record:
        """The record in this row, after checking every column of the layout."""
        own: dict[str, Any] = {"messages": None, "prompt": "", "completion": ""}
        if layout == ("messages",):
            own["messages"] = self._messages()
        elif layout == ("prompt", "completion"):
            own |= {name: self._text(name) for name in layout}
        elif layout == ("instruction", "output"):
            extra = self.values.get("input") or ""
            parts = [self._text("instruction"), self._text("input") if extra else ""]
            own["prompt"] = "".join(f"{part}\n\n" for part in parts if part)
            own["completion"] = self._text("output")
        else:
            own["completion"] = self._text("text")
        fields = {
            name: value
            for name, value in self.values.items()
            if name not in _OWN and isinstance(value, str)
        }
        return Record(**own, patient=self._patient(number), fields=fields)

    def _fault(self, column: str, expected: str) -> DataError:
        return DataError(
            f"{self.path}, {self.place}, column `{column}`: expected {expected}; correct that row"
        )

    def _text(self, column: str) -> str:
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self._fault(column, "text that is not empty")
        return value

    def _patient(self, number: str) -> str:
        """The patient's id, marked so that a row without the column cannot collide with one."""
        if "patient_id" not in self.values:
            return f"{NAMELESS}{number}"
        value = self.values["patient_id"]
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise self._fault("patient_id", "an id in every row, or no such column")
        return f"id {value}"

    def _messages(self) -> tuple[Message, ...]:
        expected = (
            "a list of {role, content} turns, at least one before the last, which is the "
            "assistant's"
        )
        turns = self.values.get("messages")
        if not isinstance(turns, list) or len(turns) < 2:
            raise self._fault("messages", expected)
        for turn in turns:
            if not isinstance(turn, dict):
                raise self._fault("messages", expected)
            texts = (turn.get("role"), turn.get("content"))
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise self._fault("messages", "text as role and content of every turn")
        if turns[-1]["role"] != "assistant":
            raise self._fault("messages", expected)
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


Rows = Iterator[tuple[str, Mapping[str, Any]]]


def _jsonl_rows(path: Path, cache: str) -> Rows:
    """Lines parsed one by one.

    The JSON reader of `datasets` would guess a type for a whole column (text that looks like a
    date becomes one) and cannot say which line is at fault, so its text reader is used.
    """
    lines = datasets.Dataset.from_text(
        str(path), streaming=True, cache_dir=cache, encoding="utf-8-sig"
    )
    for number, line in enumerate(lines, start=1):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except ValueError as error:
            where = f"line {number}, character {getattr(error, 'colno', 1)}"
            raise DataError(
                f"{path}, {where}: not valid JSON; expected one JSON object per line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected one JSON object per line")
        yield f"line {number}", row


def _csv_rows(path: Path, cache: str) -> Rows:  # noqa: ARG001
    """Rows as text, with the line on which each starts.

    The CSV reader of `datasets` gives no line numbers, stops at a ragged row without naming its
    column, and leaves the file open when it streams; Python's own does none of this.
    """
    rows = _check_csv(path)
    for line, cells in rows[1:]:
        yield f"line {line}", dict(zip(rows[0][1], cells, strict=True))


def _check_csv(path: Path) -> list[tuple[int, list[str]]]:
    """(line on which it starts, cells) of the header and each row that is not blank."""
    rows: list[tuple[int, list[str]]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        start = 1
        try:
            for cells in reader:
                if cells:
                    rows.append((start, cells))
                start = reader.line_num + 1
        except csv.Error:
            raise DataError(
                f"{path}, line {start}: a quoted cell does not end or is followed by text; "
                'expected "..." with quotes inside doubled'
            ) from None
    names = rows[0][1] if rows else []
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(cells)} columns; expected {len(names)} as in the header"
            )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}, line {rows[0][0]}, column `{twice[:50]}`: expected it once only")
    return rows


def _parquet_rows(path: Path, cache: str) -> Rows:
    """Rows by number, from 1; the file has its own types."""
    rows = datasets.Dataset.from_parquet(str(path), streaming=True, cache_dir=cache)
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


_ROWS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
