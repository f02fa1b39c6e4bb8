"""Answers: what the model writes after each prompt, and how near that is to the right answer.

Greedy decoding, so the same adapter writes the same answers. ROUGE (Lin 2004) is `torchmetrics`',
without stemming: the F measure of words (1), pairs of words (2) and the longest common
subsequence (L).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from fedqlora.engine.data import Record, Tokenized
from fedqlora.engine.model import BaseModel

EXACT_MATCH = "exact_match"
ROUGE = ("rouge1", "rouge2", "rougeL")
_MAX_BATCH = 32


def write_answers(
    base: BaseModel, examples: Sequence[Tokenized], most_tokens: int, batch_tokens: int
) -> list[str]:
    """The likeliest token after the likeliest token, until the end token or `most_tokens`.

    Args:
        base: the model with the adapter that writes, in evaluation mode.
        examples: their prompts are read; none is empty.
        most_tokens: longest answer.
        batch_tokens: prompt tokens of one batch.

    Returns:
        For each example the text, without white space at its ends.
    """
    answers = [""] * len(examples)
    for rows in _batches(base, examples, batch_tokens):
        written = _write(base, [examples[i] for i in rows], most_tokens)
        for row, text in zip(rows, written, strict=True):
            answers[row] = text.strip()
    return answers


def compare(answers: Sequence[str], records: Sequence[Record]) -> list[dict[str, float]]:
    """For each answer 1 or 0 for the very text of the record, and its ROUGE F measures."""
    # Three seconds, which a score without written answers does not need.
    from torchmetrics.functional.text.rouge import rouge_score

    found = []
    for answer, record in zip(answers, records, strict=True):
        right = record.completion if record.messages is None else record.messages[-1]["content"]
        near = rouge_score(answer, right, rouge_keys=ROUGE)
        found.append(
            {EXACT_MATCH: float(answer == right.strip())}
            | {name: float(near[f"{name}_fmeasure"]) for name in ROUGE}
        )
    return found


def _batches(base: BaseModel, examples: Sequence[Tokenized], tokens: int) -> Iterator[list[int]]:
    """Rows by length; of one length only where padding would be in a recurrent state."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].prompt), i))
    stateful = base.model.get_base_model()._is_stateful
    lengths = itertools.groupby(order, lambda i: len(examples[i].prompt) if stateful else 0)
    for _, same in lengths:
        rows = list(same)
        longest = len(examples[rows[-1]].prompt)
        size = max(1, min(_MAX_BATCH, tokens // longest))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _write(base: BaseModel, examples: Sequence[Tokenized], most_tokens: int) -> list[str]:
    pad = base.tokenizer.pad_token_id or 0
    longest = max(len(example.prompt) for example in examples)
    ids = [[pad] * (longest - len(e.prompt)) + list(e.prompt) for e in examples]
    mask = [[0] * (longest - len(e.prompt)) + [1] * len(e.prompt) for e in examples]
    written = base.model.generate(
        input_ids=torch.tensor(ids, device=base.device),
        attention_mask=torch.tensor(mask, device=base.device),
        max_new_tokens=most_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=base.tokenizer.eos_token_id,
        # Some checkpoints come with settings for sampling, which greedy decoding warns about.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    new = written if base.family == "seq2seq" else written[:, longest:]
    texts: list[str] = base.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
