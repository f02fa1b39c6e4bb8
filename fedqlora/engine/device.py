"""Device: where models compute, chosen once at a process's start and never changed silently."""

from __future__ import annotations

import argparse
import logging

import torch

from fedqlora.errors import ConfigError

logger = logging.getLogger("fedqlora")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--memory-fraction` and `--shard`, for `open_devices`."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default); cuda refuses to start without",
    )
    parser.add_argument(
        "--memory-fraction",
        type=float,
        metavar="F",
        help="at most this share of the GPU's memory, above 0 and up to 1: for a shared GPU",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="spread a base model that no one GPU holds over all GPUs that this process sees",
    )


def open_devices(options: argparse.Namespace) -> tuple[torch.device, dict[int, int] | None]:
    """What `add_device_options` asked for.

    Returns:
        The device that inputs go to, and with `--shard` the free bytes of each GPU by its number.

    Raises:
        ConfigError: a GPU that was asked for is not there, or an option is out of range.
    """
    device = choose_device(options.device, options.memory_fraction)
    if not options.shard:
        return device, None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise ConfigError(
            f"--shard spreads a base model over several GPUs and this process sees {count}; give "
            "it more, or leave --shard out"
        )
    share = 1.0 if options.memory_fraction is None else options.memory_fraction
    memory = {}
    for gpu in range(count):
        free, total = torch.cuda.mem_get_info(gpu)
        torch.cuda.set_per_process_memory_fraction(share, gpu)
        memory[gpu] = min(free, int(total * share))
    return torch.device("cuda", 0), memory


def choose_device(name: str = "auto", memory_fraction: float | None = None) -> torch.device:
    """The device that a process computes on; a GPU is tried out with one small tensor.

    Args:
        name: `auto`, `cpu` or `cuda`.
        memory_fraction: cap on this process's share of the GPU's memory; None sets none.

    Raises:
        ConfigError: `cuda` without a usable GPU, or a fraction that is out of range or not for a
            GPU.
    """
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ConfigError(
            f"--memory-fraction {memory_fraction} is not above 0 and up to 1; correct it"
        )
    usable = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not usable:
        build = torch.version.cuda
        raise ConfigError(
            "--device cuda finds no usable GPU ("
            + ("no device or driver in sight" if build else "this torch was built without CUDA")
            + "); give this process a GPU and a CUDA image, or choose --device cpu"
        )
    if not usable:
        if memory_fraction is not None:
            raise ConfigError("--memory-fraction is for a GPU only; leave it out on a CPU")
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        torch.zeros(1, device=device)
        if memory_fraction is not None:
            torch.cuda.set_per_process_memory_fraction(memory_fraction)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"the GPU cannot be used ({reason}); free it or mend its driver, or choose --device cpu"
        ) from None
    share = "" if memory_fraction is None else f", at most {memory_fraction:.0%} of its memory"
    logger.info("computing on %s%s", torch.cuda.get_device_name(), share)
    return device
