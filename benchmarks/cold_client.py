"""A client that starts from nothing each round, as Flower's own LLM example trains.

Run as a process by round_overhead: it imports the libraries, loads and quantizes the model,
reads the data, and runs TRL's SFTTrainer in bfloat16 for the round's steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    """Train one round and end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args()

    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16
    )
    adapter = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = datasets.load_dataset(
        "json", data_files=str(options.records / "records.jsonl"), split="train"
    ).select_columns(["prompt", "completion"])
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            max_length=512,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        SFTTrainer(
            model=get_peft_model(model, adapter),
            args=settings,
            train_dataset=rows,
            processing_class=tokenizer,
        ).train()


if __name__ == "__main__":
    main()
