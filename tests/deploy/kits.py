"""A federation's folder and an image that kits of a test are made from; no engine is asked."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from certs.site import make_all
from deploy.image import Image
from deploy.kit import build_kit

SUPERLINK = "superlink.example.org:9092"

IMAGE = Image(
    reference="registry.example.org/fedqlora-client@sha256:" + "d" * 64,
    id="sha256:" + "a" * 64,
    device="cpu",
    version="0.1.0",
    revision="c" * 40,
    created="2026-11-01T10:20:30.123456789Z",
    bytes=1_440_000_000,
    python={"torch": "2.13.0+cpu", "flwr": "1.39.0"},
    debian={"libc6": "2.36-9+deb12u10"},
)


def make_federation(folder: Path) -> Path:
    """Keys of a centre and of site b; site a is to come."""
    out = folder / "out"
    make_all(out, ["b"], ["superlink.example.org"])
    return out


def unpack(kit: Path, folder: Path) -> Path:
    """The kit's folder, unpacked by the program that a hospital has."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-xzf", kit, "-C", folder], check=True)
    with tarfile.open(kit) as tar:
        return folder / tar.getnames()[0].split("/")[0]


def make_kit(certs: Path, out: Path, release: str = "0.1.0", site: str = "a") -> Path:
    """A kit of site a, or of another."""
    return build_kit(certs, site, SUPERLINK, IMAGE, out, release=release)
