"""Data: records split by patient and turned into token ids, prompt and completion apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedqlora.engine.records import Record, load_records
from fedqlora.errors import DataError

__all__ = ["Record", "Tokenized", "load_records", "split_records", "tokenize"]


@dataclass(frozen=True)
class Tokenized:
    """One example as token ids.

    Attributes:
        prompt: what is read: no loss. Empty for plain text (but for the begin token that some
            tokenizers set). For a sequence-to-sequence model, the encoder's input.
        completion: what is learned; ends with the end token unless it was cut.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def split_records(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split into training and validation records by patient.

    Guarantees: a patient's records are all on one side; the same records, in any order, give
    the same sides; a patient's place in the draw does not depend on the other patients.

    Args:
        records: all records of a site.
        fraction: share of the patients held back, rounded; with two patients or more and a
            fraction above 0 at least one is held back, and at least one always trains.
        seed: another seed draws other patients.

    Returns:
        (training, validation), each in the order of `records`.
    """
    patients = {record.patient for record in records}
    count = min(round(fraction * len(patients)), len(patients) - 1)
    if fraction > 0 and len(patients) > 1:
        count = max(count, 1)

    def draw(patient: str) -> bytes:
        return hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    held_back = set(sorted(patients, key=draw)[: max(count, 0)])
    training = [record for record in records if record.patient not in held_back]
    return training, [record for record in records if record.patient in held_back]


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    family: Literal["causal", "seq2seq"],
    max_length: int,
) -> list[Tokenized]:
    """Turn records into token ids.

    A chat goes through the tokenizer's template, and only its last turn is learned. Other
    layouts are taken as they are: prompt and completion are tokenized apart, so the boundary
    between them is a boundary between tokens, in training as in scoring.

    Args:
        records: what `load_records` gave.
        tokenizer: a Hugging Face tokenizer.
        family: `causal` cuts prompt and completion to `max_length` tokens together,
            `seq2seq` each on its own.
        max_length: longest example; the start of a longer prompt is cut, then the end of a
            completion that alone is too long.

    Raises:
        DataError: a chat without a chat template, or plain text for a model that needs prompts.
    """
    return [_tokenize(record, tokenizer, family, max_length) for record in records]


def _tokenize(record: Record, tokenizer: Any, family: str, max_length: int) -> Tokenized:
    end: int = tokenizer.eos_token_id
    if record.messages is not None:
        prompt_text, completion_text = _apply_template(record, tokenizer)
        prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    else:
        if family == "seq2seq" and not record.prompt:
            raise DataError(
                "a sequence-to-sequence model cannot learn from a `text` column; "
                "give `prompt` and `completion`"
            )
        completion_text = record.completion
        prompt = tokenizer(record.prompt)["input_ids"]
        if family == "causal" and prompt and prompt[-1] == end:
            prompt = prompt[:-1]
    completion = tokenizer(completion_text, add_special_tokens=False)["input_ids"] + [end]
    if family == "seq2seq":
        return Tokenized(tuple(prompt[-max_length:]), tuple(completion[:max_length]))
    # One prompt token stays, as the first completion token is predicted from it.
    completion = completion[: max_length - min(len(prompt), 1)]
    room = max_length - len(completion)
    return Tokenized(tuple(prompt[max(len(prompt) - room, 0) :]), tuple(completion))


def _apply_template(record: Record, tokenizer: Any) -> tuple[str, str]:
    """(all turns but the last with the cue to answer, the last turn without its end token)."""
    if not tokenizer.chat_template:
        raise DataError(
            "the base model has no chat template for a `messages` column; "
            "give `prompt` and `completion`"
        )
    turns = list(record.messages or ())
    prompt: str = tokenizer.apply_chat_template(
        turns[:-1], tokenize=False, add_generation_prompt=True
    )
    full: str = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template may render the last turn differently as history; then its text stands alone.
    answer = full[len(prompt) :] if full.startswith(prompt) else turns[-1]["content"]
    return prompt, answer.rstrip().removesuffix(tokenizer.eos_token)
