"""Tiny random models of each family, with a tokenizer made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{number}" for number in range(60)]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}

_WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

SETTINGS: dict[str, dict[str, object]] = {
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_position_embeddings": 256, "dropout": 0.0, "init_std": 0.2, "bos_token_id": 2,
        "decoder_start_token_id": 1, "forced_eos_token_id": 1,
    },
    "falcon_mamba": {**_WIDE, "num_hidden_layers": 2, "state_size": 4},
    "gpt2": {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "jamba": {
        **_WIDE, **_HEADS, **_EXPERTS, "num_hidden_layers": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "llama": {**_WIDE, **_HEADS, "num_hidden_layers": 2},
    "mamba": {**_WIDE, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        **_WIDE, "num_heads": 8, "head_dim": 16, "num_hidden_layers": 2, "state_size": 8,
        "n_groups": 2, "chunk_size": 32,
    },
    "mixtral": {**_WIDE, **_HEADS, "num_hidden_layers": 2, "num_local_experts": 4},
    "qwen3_next": {
        **_WIDE, **_HEADS, **_EXPERTS, "num_hidden_layers": 2, "head_dim": 16,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, "full_attention_interval": 2,
    },
    "recurrent_gemma": {
        **_WIDE, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
        "lru_width": 64, "attention_window_size": 64,
    },
    # It rescales the second layer for inference, as every seventh of a large model.
    "rwkv": {
        "hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "context_length": 256, "rescale_every": 1,
    },
    "t5": {
        "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    },
    "zamba2": {
        **_WIDE, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "attention_head_dim": 32, "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 8,
        "mamba_ngroups": 1, "chunk_size": 32, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "adapter_rank": 8,
    },
}  # fmt: skip
"""Sizes of a tiny model, by transformers' model type."""

SEQ2SEQ = ("bart", "t5")


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )
    fast.save_pretrained(folder)


def save_tiny(model_type: str, folder: Path, **changes: object) -> Path:
    """A checkpoint of a model type with random weights, the same each time."""
    torch.manual_seed(0)
    tokens = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 1}
    settings = {"bos_token_id": None, **tokens, **SETTINGS[model_type], **changes}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if model_type in SEQ2SEQ
        else transformers.AutoModelForCausalLM
    )
    auto.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path, layers: int = 2) -> Path:
    return save_tiny("llama", folder, num_hidden_layers=layers)


def save_t5(folder: Path) -> Path:
    return save_tiny("t5", folder)


def save_mamba(folder: Path) -> Path:
    return save_tiny("mamba", folder)
