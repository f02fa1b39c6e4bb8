"""Records from files, the split by patient, and tokens: prompt and completion apart."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqlora.engine.data import Record, load_records, split_records, tokenize
from fedqlora.engine.model import BaseModel
from fedqlora.errors import DataError

PAIR = {"prompt": "w1", "completion": "w2"}
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the file's ending names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, ending: str) -> None:
    rows = [
        {"prompt": "2021-03-04", "completion": "NA", "patient_id": "007", "ward": "x"},
        {"prompt": 'two\nlines, "quoted"', "completion": " 1.50", "patient_id": "7", "ward": "é"},
    ]
    records = load_records(write(tmp_path / f"r.{ending}", rows))
    assert [(r.prompt, r.completion, r.patient, dict(r.fields)) for r in records] == [
        ("2021-03-04", "NA", "id 007", {"ward": "x"}),
        ('two\nlines, "quoted"', " 1.50", "id 7", {"ward": "é"}),
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "do", "input": "this", "output": "done"}, "do\n\nthis\n\n", "done"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\n\n", "done"),
        ({"instruction": "do", "output": "done"}, "do\n\n", "done"),
        ({"text": "all of it"}, "", "all of it"),
        ({"prompt": "p", "completion": "c", "text": "t"}, "p", "c"),
    ],
)
def test_each_layout_is_told_by_its_columns(
    tmp_path: Path, row: dict[str, str], prompt: str, completion: str
) -> None:
    record = load_records(write(tmp_path / "r.jsonl", [row, row]))[0]
    assert (record.prompt, record.completion) == (prompt, completion)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_chat_keeps_its_turns(tmp_path: Path, ending: str) -> None:
    records = load_records(write(tmp_path / f"r.{ending}", [{"messages": CHAT}] * 2))
    assert [dict(turn) for turn in records[0].messages or ()] == CHAT


def test_a_folder_is_read_by_file_name_and_rows_without_a_patient_are_their_own(
    tmp_path: Path,
) -> None:
    write(tmp_path / "b.csv", [{**PAIR, "completion": "second"}])
    write(tmp_path / "a.jsonl", [{**PAIR, "completion": "first"}])
    (tmp_path / "notes.txt").write_text("not data")
    records = load_records(tmp_path)
    assert [record.completion for record in records] == ["first", "second"]
    assert len({record.patient for record in records}) == 2


JSONL_FAULTS = [
    ('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}', "line 2, column `pro"),
    ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}', "line 3, column `completion`"),
    ('{"prompt": "a", "completion": " "}', "line 1, column `completion`: expected text"),
    ('{"prompt": "a", "completion": "b"', "line 1, character 34: not valid JSON"),
    ('["prompt"]', "line 1: expected one JSON object"),
    ('{"prompt": "a"}', "column `completion` is missing or empty beside `prompt`"),
    ('{"question": "a"}', "line 1: no known column; expected columns `messages`"),
    ('{"messages": "hello"}', "line 1, column `messages`: expected a list"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "column `messages`: expected a list"),
    (json.dumps({"messages": CHAT[::-1]}), "which is the assistant's"),
    (json.dumps({"messages": [{"role": "user"}, CHAT[1]]}), "role and content of every turn"),
    ('{"prompt": "a", "completion": "b", "patient_id": null}', "column `patient_id`: expected"),
]
CSV_FAULTS = [
    ("prompt,completion\na,b\nc\n", "line 3: 1 columns; expected 2"),
    ("prompt,completion\na,b\nc,d,e\n", "line 3: 3 columns; expected 2"),
    ('prompt,completion\n"a\nb",c\nd,\n', "line 4, column `completion`: expected text"),
    ('prompt,completion\na,b\nc,"d\n', "line 3: a quoted cell does not end"),
    ("prompt,prompt,completion\na,b,c\n", "line 1, column `prompt`: expected it once"),
]


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [("jsonl", *fault) for fault in JSONL_FAULTS] + [("csv", *fault) for fault in CSV_FAULTS],
)
def test_a_bad_file_is_named_with_line_and_column(
    tmp_path: Path, ending: str, content: str, message: str
) -> None:
    file = tmp_path / f"bad.{ending}"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_records(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


def test_a_fault_in_parquet_names_the_row(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.parquet", [PAIR, {**PAIR, "prompt": None}])
    with pytest.raises(DataError, match="row 2, column `prompt`"):
        load_records(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("r.csv", b"prompt,completion\n\xff,b\n", "not UTF-8"),
        ("r.parquet", b"PAR1 nothing", "not a .parquet file"),
        ("r.xlsx", b"", "convert it"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_records(tmp_path / name)


@pytest.mark.parametrize("count", [0, 1])
def test_a_site_with_too_little_data_is_refused_by_name(tmp_path: Path, count: int) -> None:
    file = write(tmp_path / "r.jsonl", [PAIR] * count)
    with pytest.raises(DataError, match=f"site north .* {count} records where at least 2"):
        load_records(file, site="north")


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no"):
        load_records(tmp_path)


def test_reading_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "r.jsonl", [PAIR] * 2)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "scratch")
    assert len(load_records(file)) == 2
    assert list((tmp_path / "scratch").iterdir()) == []


def record(patient: str, completion: str = "w2") -> Record:
    return Record(messages=None, prompt="w1", completion=completion, patient=patient, fields={})


@settings(max_examples=60, deadline=None)
@given(
    patients=st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=40),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_the_split_never_splits_a_patient_and_does_not_depend_on_order(
    patients: list[str], fraction: float, seed: int, data: st.DataObject
) -> None:
    records = [record(patient, str(i)) for i, patient in enumerate(patients)]
    training, validation = split_records(records, fraction, seed)
    held_back = {r.patient for r in validation}
    assert not held_back & {r.patient for r in training}
    assert sorted(r.completion for r in training + validation) == sorted(
        r.completion for r in records
    )
    assert training or not records
    assert bool(validation) == (fraction > 0 and len(set(patients)) > 1)
    shuffled = data.draw(st.permutations(records))
    assert {r.patient for r in split_records(shuffled, fraction, seed)[1]} == held_back


def test_the_split_holds_back_the_asked_share_and_another_seed_draws_others() -> None:
    records = [record(str(i)) for i in range(100)]
    first = split_records(records, 0.1, 1)[1]
    assert len(first) == 10
    assert first != split_records(records, 0.1, 2)[1]


def words(*ids: int) -> tuple[int, ...]:
    """Ids of w1, w2, ... in the tests' tokenizer."""
    return tuple(3 + i for i in ids)


END = 1


def test_plain_text_is_tokenized_as_it_is_and_ends_with_the_end_token(llama: BaseModel) -> None:
    [tokens] = tokenize([record("p", "w2 w3")], llama.tokenizer, "causal", 16)
    assert tokens.prompt == words(1)
    assert tokens.completion == (*words(2, 3), END)


def test_a_text_row_has_an_empty_prompt(llama: BaseModel, t5: BaseModel) -> None:
    text = Record(messages=None, prompt="", completion="w2 w3", patient="p", fields={})
    [tokens] = tokenize([text], llama.tokenizer, "causal", 16)
    assert (tokens.prompt, tokens.completion) == ((), (*words(2, 3), END))
    with pytest.raises(DataError, match="sequence-to-sequence"):
        tokenize([text], t5.tokenizer, "seq2seq", 16)


def test_a_chat_goes_through_the_template_and_only_its_last_turn_is_learned(
    llama_folder: Path,
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    turns = (*CHAT, {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"})
    chat = Record(messages=turns, prompt="", completion="", patient="p", fields={})
    with pytest.raises(DataError, match="no chat template"):
        tokenize([chat], tokenizer, "causal", 64)
    # w50 opens a turn of the user, w51 of the assistant; the end token and w52 close it.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w50 ' if m.role == 'user' else 'w51 ' }}{{ m.content }}"
        "{{ ' </s> w52 ' if m.role == 'user' else ' </s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}w51 {% endif %}"
    )
    [tokens] = tokenize([chat], tokenizer, "causal", 64)
    before = [*words(50, 1), END, *words(52, 51, 2), END, *words(50, 3), END, *words(52, 51)]
    assert tokens.prompt == tuple(before)
    assert tokens.completion == (*words(4, 5), END)


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 30), completion=st.integers(1, 30), longest=st.integers(8, 40))
def test_a_long_example_loses_the_start_of_its_prompt_first(
    llama: BaseModel, prompt: int, completion: int, longest: int
) -> None:
    long = Record(
        messages=None,
        prompt=" ".join(f"w{i}" for i in range(prompt)),
        completion=" ".join(f"w{i}" for i in range(completion)),
        patient="p",
        fields={},
    )
    [whole] = tokenize([long], llama.tokenizer, "causal", 1000)
    [cut] = tokenize([long], llama.tokenizer, "causal", longest)
    assert len(cut.prompt) + len(cut.completion) == min(prompt + completion + 1, longest)
    assert whole.prompt[len(whole.prompt) - len(cut.prompt) :] == cut.prompt
    assert len(cut.prompt) >= 1
    assert whole.completion[: len(cut.completion)] == cut.completion
    if completion + 2 <= longest:
        assert cut.completion[-1] == END
