"""Engine: models, data and training on one machine; the only importers of torch and its kin."""

import gc
import logging
import os

# Before torch loads OpenMP. By default its threads spin while they wait for each other; with
# another process on the same cores (a second trainer, the SuperLink) that stalls every small
# operation. Measured on two cores, SmolLM2-135M in bfloat16, two threads: a step of 8 texts
# takes 0.8 s passive, and from 0.6 s to over 50 s spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# bitsandbytes offers to fetch a CPU kernel from a hub when it is imported: neither wanted nor
# possible in a trainer.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Importing torch, transformers and PEFT makes a million objects that stay: looking through them
# for cycles after every 700 new ones takes a sixth of a trainer's start.
gc.set_threshold(10_000)
