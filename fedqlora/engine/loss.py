"""Loss: summed cross-entropy of the completion tokens, and the check that packing is safe.

Vocabulary logits are a large share of a small model's work, so the output head is given the K
places that carry loss instead of all R x L (L tokens of R rows).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedqlora.engine.batch import Microbatch, pack_rows, pad_pairs, pad_rows
from fedqlora.engine.data import Tokenized
from fedqlora.engine.model import BaseModel
from fedqlora.errors import ModelError
from fedqlora.training_config import TrainingConfig

logger = logging.getLogger("fedqlora")

# Measured on two cores (AMX), SmolLM2-135M, 1024 tokens: rows of 128 take 1.36 s a step with
# plain matrix products and 1.68 s with torch's fused attention, rows of 256 1.48 s and 1.65 s,
# rows of 512 the fused one is faster. On CUDA it always is.
_EAGER_LENGTH = 256


def plan_batches(
    base: BaseModel, examples: Sequence[Tokenized], config: TrainingConfig
) -> list[Microbatch]:
    """Microbatches that together hold all the examples, on the model's device.

    Packed where the configuration asks for it and the model keeps packed examples apart, which
    is checked once on the model itself; padded otherwise.
    """
    limit = config.microbatch_tokens
    padding = base.tokenizer.pad_token_id
    if padding is None:
        padding = base.tokenizer.eos_token_id
    if base.family == "seq2seq":
        start = base.model.config.decoder_start_token_id
        batches = pad_pairs(examples, limit, padding, start)
    elif config.packing and _packs(base):
        batches = pack_rows(examples, limit)
    else:
        batches = pad_rows(examples, limit, padding)
    return [batch.to(base.device) for batch in batches]


def sum_losses(base: BaseModel, batch: Microbatch) -> Tensor:
    """Cross-entropy summed over a microbatch's K targets, a float32 scalar.

    Raises:
        ModelError: the architecture's output head cannot be told which places to keep.
    """
    logits = compute_logits(base, batch)
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")


def compute_logits(base: BaseModel, batch: Microbatch) -> Tensor:
    """Logits (K, vocabulary) at the places that the microbatch keeps."""
    _choose_attention(base, batch)
    with base.computing(), _kept(base, batch.keep):
        logits: Tensor = base.model(**batch.inputs, use_cache=False).logits
    if logits.ndim != 2 or len(logits) != len(batch.keep):
        raise ModelError(
            f"{type(base.model.get_base_model()).__name__} treats its output head in a way that "
            "is not supported; choose another architecture"
        )
    return logits


def check_isolation(base: BaseModel) -> bool:
    """Whether packed examples stay apart in this very model: a test, not a list of names.

    Guarantees: with True, changing one example leaves the logits of the one behind it as they
    were, and they are those of the example alone, up to rounding. Recurrent and convolutional
    layers, and models that know no position ids, give False.
    """
    if "position_ids" not in inspect.signature(base.model.get_base_model().forward).parameters:
        return False
    ids = range(min(base.model.config.get_text_config().vocab_size, 64))
    first, other, last = (Tokenized((), tuple(ids[start::4][:9])) for start in range(3))
    training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            together, changed, alone = (
                compute_logits(base, pack.to(base.device))[-(len(last.completion) - 1) :].float()
                for pack in (
                    *pack_rows([first, last], 64),
                    *pack_rows([other, last], 64),
                    *pack_rows([last], 64),
                )
            )
    finally:
        base.model.train(training)
    size = alone.abs().max()
    leak = (together - changed).abs().max()
    shift = (together - alone).abs().max()
    return bool(leak <= 1e-5 * size) and bool(shift <= 0.05 * size)


def _packs(base: BaseModel) -> bool:
    """The answer of `check_isolation`, asked once per loaded model."""
    if base.packs is None:
        base.packs = check_isolation(base)
        name = type(base.model.get_base_model()).__name__
        logger.info("%s: examples are %s", name, "packed" if base.packs else "padded, not packed")
    return base.packs


def _choose_attention(base: BaseModel, batch: Microbatch) -> None:
    """Short packed rows on a CPU use plain attention, which is faster there."""
    if base.device.type != "cpu" or "position_ids" not in batch.inputs:
        return
    short = batch.inputs["input_ids"].shape[1] <= _EAGER_LENGTH
    wanted = "eager" if short else "sdpa"
    model = base.model.get_base_model()
    if model.config._attn_implementation != wanted and model._supports_sdpa:
        model.set_attn_implementation(wanted)


@contextmanager
def _kept(base: BaseModel, keep: Tensor) -> Iterator[None]:
    """Give the output head only the kept places: (R, L, width) becomes (K, width)."""
    head = base.model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(base.model.get_base_model()).__name__} has no output head; "
            "choose a model that generates text"
        )

    def select(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Of a spread model the head is on the last GPU, and the batch on the first.
        hidden = args[0].flatten(0, 1)
        return (hidden.index_select(0, keep.to(hidden.device)), *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
