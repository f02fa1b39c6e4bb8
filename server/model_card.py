"""Model card: what the exported adapter is, for whoever finds it without its run folder.

The format is that of Hugging Face (YAML between two rules, then markdown). It holds facts of the
run only: neither licence nor data sets are known here, and no site is named.
"""

from __future__ import annotations

import json

from fedqlora import VERSION
from server.checkpoint import Origin
from server.history import USED, History
from server.scores import models
from server.table import render

_PIPELINES = {"causal": "text-generation", "seq2seq": "text2text-generation"}
_CENTRE = ("flwr", "numpy", "safetensors")


def render_card(history: History, origin: Origin) -> str:
    """The card of a run's adapter.

    Args:
        history: the run, its last round included.
        origin: the base model that all sites had.
    """
    config = history.config
    tags = ["federated-learning", "fedqlora", "lora"]
    tags += ["qlora"] if config.model.quantization != "none" else []
    front = {
        "base_model": config.model.base,
        "library_name": "peft",
        "pipeline_tag": _PIPELINES[origin.family],
        "tags": tags,
    }
    # A JSON value is a YAML value too, and quotes whatever a name holds.
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    return f"---\n{head}---\n\n" + "\n\n".join(_paragraphs(history, origin)) + "\n"


def _paragraphs(history: History, origin: Origin) -> list[str]:
    config, lora = history.config, history.config.lora
    used = [one for one in history.contributions if one.outcome == USED]
    sites = len({one.site for one in used})
    quantized = {"none": "not quantized"}.get(config.model.quantization, "quantized to NF4")
    versions = ", ".join(
        f"{name} {history.versions[name]}" for name in _CENTRE if name in history.versions
    )
    scores = models(history)
    training = config.training
    return [
        f"# {config.name}: a LoRA adapter for `{config.model.base}`",
        f"Trained by {_count(sites, 'site')} that kept their records, in "
        f"{_count(len(history.rounds), 'round')} of run `{history.name}`. Each round every site "
        f"trained the adapter on its own records over the base model, {quantized}, and the "
        "coordinating centre aggregated the changes.",
        "\n".join(
            [
                "## How it was trained",
                "",
                f"- base model: `{config.model.base}`, digest `{origin.base_digest}`",
                f"- adapter: trained at rank {lora.rank}, alpha {lora.alpha:g}, dropout "
                f"{lora.dropout:g}"
                + (
                    f"; joined with a frozen residual of up to rank {config.residual_rank}"
                    if config.residual_rank
                    else ""
                )
                + (", rsLoRA" if lora.rslora else "")
                + (", DoRA" if lora.dora else ""),
                f"- each round and site: {training.steps} steps of {training.batch_examples} "
                f"examples of at most {training.max_length} tokens, AdamW, learning rate "
                f"{training.learning_rate:g} ({training.schedule} schedule)",
                f"- aggregation: {config.aggregation.method}, sites weighted by "
                f"{config.aggregation.weighting}; updates sent as {config.codec.update}",
                f"- updates used: {len(used)} of {len(history.contributions)}; seed {config.seed}",
                f"- software: fedqlora {VERSION}" + (f", {versions}" if versions else ""),
            ]
        ),
        "## Scores on the coordinator's held-out set\n\n"
        + (render(scores) if scores else "The run did not ask for any."),
        "\n".join(
            [
                "## Limits",
                "",
                "- The scores above are all that is known of its quality; nothing was measured "
                "of harm, bias, or other tasks than the run's.",
                "- An adapter can give back texts that it was trained on.",
                "- It fits the base model with that digest, and no other.",
            ]
        ),
        "## Use\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {_LOADERS[origin.family]}\n\n"
        f"base = {_LOADERS[origin.family]}.from_pretrained({json.dumps(config.model.base)})\n"
        'model = PeftModel.from_pretrained(base, "this folder")\n'
        "```",
    ]


_LOADERS = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
