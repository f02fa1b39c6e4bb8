"""Batches: examples laid into a few fixed shapes, packed where the model keeps them apart.

Shape letters: R rows, L tokens of a row, K completion tokens that carry loss. A packed row
holds whole examples end to end; their position ids restart, and what is left of the row is one
more segment without loss. Row lengths are multiples of 64, as each new shape costs a CPU time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedqlora.engine.data import Tokenized

_ROW_STEP = 64
_LONGEST_SEARCHED = 512
_DECODER_STEP = 16
# Linear layers cost the same for each token, attention more in longer rows; at about this length
# attention costs as much as everything else (SmolLM2-135M on a CPU).
_ATTENTION_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What goes through the model at once.

    Attributes:
        inputs: keyword arguments of the model's forward, tensors of (R, L).
        keep: (K,) places in the output, rows one after the other, whose logits are needed.
        targets: (K,) the token that each of them must predict.
        rows: which of the given examples is in each row; empty where rows are packed.
    """

    inputs: dict[str, Tensor]
    keep: Tensor
    targets: Tensor
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on another device."""
        return Microbatch(
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            keep=self.keep.to(device),
            targets=self.targets.to(device),
            rows=self.rows,
        )


def count_targets(example: Tokenized, family: str) -> int:
    """Completion tokens that carry loss: all, but for a causal text's very first token."""
    first = 1 if family == "causal" and not example.prompt else 0
    return max(len(example.completion) - first, 0)


def pack_rows(examples: Sequence[Tokenized], microbatch_tokens: int) -> list[Microbatch]:
    """Causal examples end to end, several to a row, without a mask.

    The rows' length is the cheapest of a few; examples go best fit, longest first. Isolation is
    the model's work (see `loss.check_isolation`): position ids that restart, no attention mask
    and `use_cache=False`.

    Args:
        examples: what `tokenize` gave.
        microbatch_tokens: at most so many tokens go through the model at once, but always one
            whole row.
    """
    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    width, rows = _choose_width(lengths, microbatch_tokens)
    at_once = max(microbatch_tokens // width, 1)
    passes = -(-len(rows) // at_once)
    share = -(-len(rows) // passes)
    return [
        _lay_packed([[examples[i] for i in row] for row in rows[start : start + share]], width)
        for start in range(0, len(rows), share)
    ]


def pad_rows(
    examples: Sequence[Tokenized], microbatch_tokens: int, padding: int
) -> list[Microbatch]:
    """Causal examples one to a row, similar lengths together, padded on the right and masked."""
    batches = []
    for width, group in _group_lengths(
        [len(e.prompt) + len(e.completion) for e in examples], microbatch_tokens
    ):
        ids = torch.full((len(group), width), padding)
        mask = torch.zeros_like(ids)
        keep: list[int] = []
        targets: list[int] = []
        for row, index in enumerate(group):
            tokens = examples[index].prompt + examples[index].completion
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            _note_targets(examples[index], row * width, keep, targets)
        inputs = {"input_ids": ids, "attention_mask": mask}
        batches.append(_make(inputs, keep, targets, group))
    return batches


def pad_pairs(
    examples: Sequence[Tokenized], microbatch_tokens: int, padding: int, start: int
) -> list[Microbatch]:
    """Sequence-to-sequence examples: prompts to the encoder, completions from the decoder.

    Args:
        examples: what `tokenize` gave.
        microbatch_tokens: at most so many encoder tokens at once, but always one example.
        padding: the padding token.
        start: the token that the decoder starts with.
    """
    batches = []
    for width, group in _group_lengths([len(e.prompt) for e in examples], microbatch_tokens):
        longest = max(len(examples[index].completion) for index in group)
        depth = _round_up(longest, _DECODER_STEP)
        ids = torch.full((len(group), width), padding)
        mask = torch.zeros_like(ids)
        shifted = torch.full((len(group), depth), padding)
        keep: list[int] = []
        targets: list[int] = []
        for row, index in enumerate(group):
            prompt, completion = examples[index].prompt, examples[index].completion
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
            shifted[row, : len(completion)] = torch.tensor((start, *completion[:-1]))
            keep.extend(range(row * depth, row * depth + len(completion)))
            targets.extend(completion)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted}
        batches.append(_make(inputs, keep, targets, group))
    return batches


def _make(
    inputs: dict[str, Tensor], keep: list[int], targets: list[int], rows: Sequence[int] = ()
) -> Microbatch:
    return Microbatch(
        inputs=inputs,
        keep=torch.tensor(keep, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        rows=tuple(rows),
    )


def _round_up(length: int, step: int) -> int:
    return max(-(-length // step), 1) * step


def _note_targets(example: Tokenized, offset: int, keep: list[int], targets: list[int]) -> None:
    """Append where a causal example's completion is predicted, and what is right there."""
    count = count_targets(example, "causal")
    end = offset + len(example.prompt) + len(example.completion)
    keep.extend(range(end - count - 1, end - 1))
    targets.extend(example.completion[len(example.completion) - count :])


def _choose_width(lengths: Sequence[int], limit: int) -> tuple[int, list[list[int]]]:
    """The cheapest row length, and the examples of each row."""
    narrowest = _round_up(max(lengths), _ROW_STEP)
    widest = max(min(limit, _LONGEST_SEARCHED), narrowest)
    best: tuple[float, int, list[list[int]]] | None = None
    for width in range(narrowest, widest + 1, _ROW_STEP):
        rows = _fit(lengths, width)
        cost = len(rows) * width * (1 + width / _ATTENTION_LENGTH)
        if best is None or cost < best[0]:
            best = (cost, width, rows)
    assert best is not None  # noqa: S101 - the range holds `narrowest`
    return best[1], best[2]


def _fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Best fit, longest first: each example goes into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_rows = [r for r in range(len(rows)) if room[r] >= lengths[index]]
        if open_rows:
            row = min(open_rows, key=lambda r: room[r])
            rows[row].append(index)
            room[row] -= lengths[index]
        else:
            rows.append([index])
            room.append(width - lengths[index])
    return rows


def _group_lengths(lengths: Sequence[int], limit: int) -> list[tuple[int, list[int]]]:
    """(row length, examples) of each microbatch, longest first.

    A shorter example joins a longer one's rows while its own row would be at least half as long.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups:
            width, group = groups[-1]
            own = _round_up(lengths[index], _ROW_STEP)
            if (len(group) + 1) * width <= limit and 2 * own >= width:
                group.append(index)
                continue
        groups.append((_round_up(lengths[index], _ROW_STEP), [index]))
    return groups


def _lay_packed(rows: Sequence[Sequence[Tokenized]], width: int) -> Microbatch:
    """Packed rows; the unused end of a row is a segment of its own."""
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    positions = torch.zeros_like(ids)
    keep: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        offset = 0
        for example in row:
            tokens = example.prompt + example.completion
            end = offset + len(tokens)
            ids[number, offset:end] = torch.tensor(tokens)
            positions[number, offset:end] = torch.arange(len(tokens))
            _note_targets(example, number * width + offset, keep, targets)
            offset = end
        positions[number, offset:] = torch.arange(width - offset)
    return _make({"input_ids": ids, "position_ids": positions}, keep, targets)
