from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from fedqlora.adapter import Adapter
from fedqlora.engine.export import answer, merge
from fedqlora.engine.model import BaseModel
from fedqlora.errors import CheckpointError, ModelError
from tests.engine.conftest import load


def random_adapter(base: BaseModel) -> Adapter:
    generator = np.random.default_rng(3)
    return {
        name: generator.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in base.spec().shapes
    }


def save_adapter(base: BaseModel, adapter: Adapter, out: Path) -> Path:
    out.mkdir()
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in adapter})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if base.family == "seq2seq" else "CAUSAL_LM",
        "base_model_name_or_path": base.folder.name,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 16.0,
        "target_modules": targets,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_a_merged_checkpoint_gives_the_logits_of_base_and_adapter(
    llama_folder: Path, t5_folder: Path, tmp_path: Path, family: str
) -> None:
    folder = llama_folder if family == "causal" else t5_folder
    base = load(folder, nf4=False)
    adapter = random_adapter(base)
    base.set_adapter(adapter)
    base.model.eval()
    out = tmp_path / "merged"
    merge(folder, save_adapter(base, adapter, tmp_path / "adapter"), out)
    auto = (
        transformers.AutoModelForCausalLM
        if family == "causal"
        else transformers.AutoModelForSeq2SeqLM
    )
    merged = auto.from_pretrained(out, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.tensor([[5, 9, 17, 33]])}
    if family == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8]])
    with torch.no_grad():
        expected = base.model(**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        with base.model.disable_adapter():
            untuned = base.model(**inputs).logits
    assert (expected - untuned).abs().max() > 0.1
    assert transformers.AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_an_existing_folder_is_not_overwritten(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        merge(llama_folder, tmp_path, tmp_path)


def test_a_full_or_unwritable_disk_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    base = load(llama_folder, nf4=False)
    adapter = save_adapter(base, random_adapter(base), tmp_path / "adapter")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        merge(llama_folder, adapter, tmp_path / "file" / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]


def test_an_adapter_of_another_model_is_refused(
    llama_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    base = load(llama_folder, nf4=False)
    adapter = save_adapter(base, random_adapter(base), tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit base model"):
        merge(t5_folder, adapter, tmp_path / "merged")


def test_a_folder_without_an_adapter_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        answer(llama_folder, tmp_path, "w1")


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_base_and_tuned_answer_side_by_side(
    llama_folder: Path, t5_folder: Path, tmp_path: Path, family: str
) -> None:
    folder = llama_folder if family == "causal" else t5_folder
    base = load(folder, nf4=False)
    random = random_adapter(base)
    zero = {name: np.zeros_like(value) for name, value in random.items()}
    tuned = save_adapter(base, random, tmp_path / "tuned")
    untuned = save_adapter(base, zero, tmp_path / "untuned")
    one, other = answer(folder, untuned, "w1 w2 w3", 8)
    assert one == other
    before, after = answer(folder, tuned, "w1 w2 w3", 8)
    assert before == one
    assert after != before
