"""TrainingConfig: the steps of one round at one site."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedqlora.section import Section


class TrainingConfig(Section):
    """What one site does in one round. The optimizer starts fresh each round."""

    steps: int = Field(default=10, ge=1)
    """Optimizer steps per round and site."""
    fewer_steps: bool = False
    """Whether a site whose policy allows fewer steps trains those, with a smaller weight, instead
    of refusing the run."""
    batch_examples: int = Field(default=16, ge=1)
    """Examples per optimizer step."""
    microbatch_tokens: int = Field(default=2048, ge=16)
    """Largest number of tokens in one forward pass; a batch above it is accumulated."""
    max_length: int = Field(default=512, ge=8)
    """Longest example in tokens; the end of a longer prompt is kept, its start cut."""
    packing: bool = True
    """Lay examples end to end without padding where the architecture keeps them apart."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """One schedule over all rounds of the run: a round continues where the last ended."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up at the start of the run, in optimizer steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm over all trainable tensors."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    proximal: float = Field(default=0.0, ge=0)
    """FedProx (arXiv 1812.06127): mu of the term mu/2 |w - w of the round's start|^2 that is added
    to the loss, so that many local steps do not carry a site far from the others."""
    control_variates: bool = False
    """SCAFFOLD (arXiv 1910.06378): each step is corrected by the difference between all sites'
    mean gradient and the site's own, of the last round that it took part in."""
