"""The GPU overlay: which device each trainer and the evaluator of the development cluster gets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deploy.cluster import HEAD, RenderError, read_command, site_names, trainer_command

SHARED_MEMORY = 0.9
"""Part of a shared device that all models together may take; the rest is CUDA's own."""

_DEVICE = re.compile(r"0|[1-9][0-9]*|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+")

GPU_SERVICE = """\
  {name}:
    # Without DEVICE=cuda it would be the image for CPUs.
    image: ${{{variable}:-{image}:${{DEVICE:?set DEVICE=cuda, as make up GPU=1 does}}}}{command}
    # Code that a library builds for the device at run time is loaded from here.
    tmpfs: !override ["/tmp:size=64m,mode=1777,exec"]
    deploy:
      resources:
        reservations:
          devices: [{{driver: nvidia, device_ids: ["{device}"], capabilities: [gpu]}}]
"""


def choose_devices(sites: int, gpus: str) -> list[str]:
    """The device ids in a text; without any, the machine's first ones, one each."""
    return gpus.split(",") if gpus else [str(number) for number in range(sites + 1)]


def render_overlay(sites: int, devices: Sequence[str], shared: bool) -> str:
    """The overlay that gives each trainer and the evaluator a device and the CUDA images.

    Args:
        sites: number of sites.
        devices: device ids, the sites' first, then the evaluator's; a single one if shared.
        shared: whether all share `devices[0]`, each with a part of its memory.

    Raises:
        RenderError: a number or a device cannot be, or one is there twice.
    """
    names = site_names(sites)
    users = sites + 1
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise RenderError(
                f"{device or 'An empty text'} is no GPU: take an index, a GPU-... or a MIG-... id "
                "as `nvidia-smi -L` prints them."
            )
    if shared:
        if len(devices) != 1:
            raise RenderError("SHARED_GPU takes one device: for several set GPUS.")
        given, arguments = [*devices] * users, f"--shared-gpu {devices[0]}"
    else:
        given, arguments = [*devices], f"--gpus {','.join(devices)}"
        twice = [device for device in given if given.count(device) > 1]
        if twice:
            raise RenderError(
                f"GPU {twice[0]} is there twice: give each site and the evaluator one of its own, "
                "or set SHARED_GPU to share one on purpose."
            )
        if len(given) != users:
            raise RenderError(
                f"{sites} site{'s'[: sites > 1]} and the evaluator need {users} GPUs, not "
                f"{len(given)}: set GPUS to {users} ids, or SHARED_GPU to one that all share."
            )
    # Rounded down to a hundredth.
    share = f"{int(100 * SHARED_MEMORY / users) / 100:.2f}" if shared else None
    blocks = [
        _gpu_service(f"trainer-{name}", trainer_command(name), "client", device, share)
        for name, device in zip(names, given, strict=False)
    ]
    evaluator = read_command("server", "server.evaluator")
    blocks.append(_gpu_service("evaluator", evaluator, "server", given[-1], share))
    head = HEAD.format(
        what="On NVIDIA GPUs: laid over docker-compose.yml; start it with DEVICE=cuda.",
        arguments=f"--sites {sites} {arguments}",
    )
    return head + "services:\n" + "\n".join(blocks)


def _gpu_service(name: str, command: str, image: str, device: str, share: str | None) -> str:
    """One service of the overlay; only a share of a device changes its command."""
    capped = f"\n    command: {command[:-1]}, --memory-fraction, {share!r}]" if share else ""
    variable = f"FEDQLORA_{image.upper()}_IMAGE"
    image = f"fedqlora-{image}"
    return GPU_SERVICE.format(
        name=name, command=capped, image=image, variable=variable, device=device
    )
