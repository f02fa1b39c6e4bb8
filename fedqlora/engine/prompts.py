"""Prompts: a batch of prompts encoded once, and the logits of what may follow each.

Shape letters: B prompts, R rows (a path after a prompt), L tokens of a path, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Path = tuple[int, ...]
"""Tokens from the first of a completion on."""


def encode_prompts(
    model: Any, family: Literal["causal", "seq2seq"], prompts: Sequence[Path], pad: int
) -> Prompts:
    """Encode prompts in the way that fits the model.

    Args:
        model: the PEFT model, in evaluation mode.
        family: decoder, or encoder and decoder.
        prompts: token ids, none empty.
        pad: a token id to fill up with; it is never attended to.
    """
    if family == "seq2seq":
        return Seq2SeqPrompts(model, prompts, pad)
    # A recurrent state has no rows to choose among, and padding on the left would be in it.
    if not model.get_base_model()._is_stateful:
        return CausalPrompts(model, prompts, pad)
    return UncachedPrompts(model, prompts, pad)


def _arguments(model: Any) -> set[str]:
    """Names that the base model's forward takes."""
    return set(inspect.signature(model.get_base_model().forward).parameters)


class Prompts(Protocol):
    """A batch of prompts, encoded once."""

    def first(self) -> Tensor:
        """Logits (B, V) of the first completion token."""

    def after(self, owners: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """Logits (R, L, V) of the token after each token of `paths`, padded on the right.

        Path r follows the prompt with index `owners[r]`.
        """


class CausalPrompts:
    """Prompts of a decoder: the cache of keys and values is kept and copied."""

    def __init__(self, model: Any, prompts: Sequence[Path], pad: int) -> None:
        self._model = model
        device = model.device
        longest = max(map(len, prompts))
        ids_bl = [[pad] * (longest - len(p)) + list(p) for p in prompts]
        mask_bl = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self._mask = torch.tensor(mask_bl, device=device)
        self._lengths = self._mask.sum(dim=1)
        # Models without absolute or rotary positions do not take `position_ids`.
        self._accepts = _arguments(model)
        extra = {
            "position_ids": (self._mask.cumsum(dim=1) - 1).clamp_min(0),
            # An index, not 1: the slice that a number makes is not contiguous, and torch then
            # copies the head's weights for every row (9.5 s and 3.6 GB for 64 rows here).
            "logits_to_keep": torch.tensor([longest - 1], device=device),
        }
        out = model(
            input_ids=torch.tensor(ids_bl, device=device),
            attention_mask=self._mask,
            use_cache=True,
            **{name: value for name, value in extra.items() if name in self._accepts},
        )
        self._first: Tensor = out.logits[:, -1]
        self._cache = out.past_key_values

    def first(self) -> Tensor:
        """Logits (B, V) at the end of the prompts."""
        return self._first

    def after(self, owners: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """Logits (R, L, V); padding stands right of a path, where a causal model ignores it."""
        rows = torch.tensor(owners, device=self._mask.device)
        ids = _pad_right(paths, self._mask.device)
        cache = copy.deepcopy(self._cache)
        cache.batch_select_indices(rows)
        extra = {}
        if "position_ids" in self._accepts:
            steps = torch.arange(ids.shape[1], device=ids.device)
            extra["position_ids"] = self._lengths[rows, None] + steps
        out = self._model(
            input_ids=ids,
            attention_mask=torch.cat([self._mask[rows], torch.ones_like(ids)], dim=1),
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        logits: Tensor = out.logits
        return logits


class UncachedPrompts:
    """Prompts of a decoder with a recurrent state: each path is read with its prompt."""

    def __init__(self, model: Any, prompts: Sequence[Path], pad: int) -> None:
        self._model = model
        self._prompts = prompts
        self._pad = pad

    def first(self) -> Tensor:
        """Logits (B, V) at the end of the prompts."""
        return self._read(range(len(self._prompts)), [()] * len(self._prompts))[:, 0]

    def after(self, owners: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """Logits (R, L, V), as `Prompts.after`."""
        return self._read(owners, paths)[:, 1:]

    def _read(self, owners: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """Logits (R, 1 + L, V) after the prompt and each token of the paths."""
        longest = max(map(len, paths))
        rows = [(*self._prompts[o], *p) for o, p in zip(owners, paths, strict=True)]
        ends = [len(self._prompts[o]) - 1 for o in owners]
        width = max(ends) + 1 + longest
        ids = [[*row, *[self._pad] * (width - len(row))] for row in rows]
        out = self._model(input_ids=torch.tensor(ids, device=self._model.device), use_cache=False)
        logits: Tensor = out.logits
        steps = torch.tensor(ends, device=logits.device)[:, None] + torch.arange(
            longest + 1, device=logits.device
        )
        return logits[torch.arange(len(rows), device=logits.device)[:, None], steps]


class Seq2SeqPrompts:
    """Prompts of an encoder-decoder: the encoder's output is kept, paths are decoded anew."""

    def __init__(self, model: Any, prompts: Sequence[Path], pad: int) -> None:
        self._model = model
        device = model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([list(p) + [pad] * (longest - len(p)) for p in prompts], device=device)
        mask = [[1] * len(p) + [0] * (longest - len(p)) for p in prompts]
        self._mask = torch.tensor(mask, device=device)
        self._encoded = model.get_encoder()(input_ids=ids, attention_mask=self._mask)[0]
        self._start: int = model.config.decoder_start_token_id
        self._first = self._decode(torch.arange(len(prompts), device=device), [()])[:, 0]

    def first(self) -> Tensor:
        """Logits (B, V) after the decoder's start token."""
        return self._first

    def after(self, owners: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """Logits (R, L, V), as `Prompts.after`."""
        return self._decode(torch.tensor(owners, device=self._mask.device), paths)[:, 1:]

    def _decode(self, rows: Tensor, paths: Sequence[Path]) -> Tensor:
        """Logits (R, 1 + L, V) after the start token and each token of the paths."""
        ids = _pad_right([(self._start, *path) for path in paths], rows.device)
        out = self._model(
            encoder_outputs=(self._encoded[rows],),
            attention_mask=self._mask[rows],
            decoder_input_ids=ids.expand(len(rows), -1),
            use_cache=False,
        )
        logits: Tensor = out.logits
        return logits


def _pad_right(paths: Sequence[Path], device: torch.device) -> Tensor:
    longest = max(map(len, paths))
    return torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths], device=device)
