"""What a kit says of an image, asked of the container engine: name, id, size, packages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from certs.files import CertificateError

# Runs inside the image: Python's packages, and Debian's from its own database.
_LIST_PACKAGES = """
import importlib.metadata, json, pathlib, re
python = {d.name: d.version for d in importlib.metadata.distributions()}
status = pathlib.Path("/var/lib/dpkg/status")
text = status.read_text(encoding="utf-8") if status.exists() else ""
fields = re.compile(r"^(Package|Version|Status): (.*)$", re.M)
blocks = [dict(fields.findall(block)) for block in text.split("\\n\\n")]
here = [block for block in blocks if block.get("Status", "").endswith(" installed")]
debian = {block["Package"]: block["Version"] for block in here}
print(json.dumps({"python": python, "debian": debian}))
"""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A built image."""

    reference: str
    """What compose starts: NAME@sha256:... where a registry holds it, otherwise an own tag."""
    id: str
    """`sha256:...` of its configuration, which names every layer by digest."""
    device: str
    """`cpu` or `cuda`, from its label."""
    version: str
    """Version of fedqlora in it, from its label."""
    revision: str
    """Commit that it was built from, from its label."""
    created: str
    """When it was built, in ISO 8601."""
    bytes: int
    """Size of its files, unpacked."""
    python: Mapping[str, str]
    """Versions of Python packages."""
    debian: Mapping[str, str]
    """Versions of Debian packages."""


def read_image(tag: str) -> Image:
    """Ask the engine for an image, and the image for its packages (a container with no network).

    An image that no registry holds gets a second tag with its id in it, so that two releases can
    lie on one machine.

    Raises:
        CertificateError: no engine answers, there is no such image, or it is not a site's.
    """
    found = json.loads(_docker("image", "inspect", tag))[0]
    labels = found["Config"].get("Labels") or {}
    if labels.get("org.opencontainers.image.title") != "fedqlora-client":
        raise CertificateError(
            f"{tag} is not the image of a site: build it with `make images`, or name another."
        )
    version = labels["org.opencontainers.image.version"]
    if found.get("RepoDigests"):
        reference = str(found["RepoDigests"][0])
    else:
        reference = f"fedqlora-client:{version}-{found['Id'].removeprefix('sha256:')[:12]}"
        _docker("tag", found["Id"], reference)
    hardened = ("--network=none", "--read-only", "--cap-drop=ALL", "--entrypoint=python")
    packages = json.loads(_docker("run", "--rm", *hardened, found["Id"], "-c", _LIST_PACKAGES))
    return Image(
        reference=reference,
        id=found["Id"],
        device=labels["org.fedqlora.device"],
        version=version,
        revision=labels["org.opencontainers.image.revision"],
        created=found["Created"],
        bytes=found["Size"],
        python=packages["python"],
        debian=packages["debian"],
    )


def save_image(image: Image, path: Path) -> None:
    """Write an image's archive, for a machine that reaches no registry.

    Raises:
        CertificateError: the engine fails.
    """
    _docker("save", "--output", str(path), image.reference)


def _docker(*arguments: str) -> str:
    """What docker prints.

    Raises:
        CertificateError: it is missing or fails.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["docker", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise CertificateError(
            "There is no docker command: install Docker Engine 20.10 or newer."
        ) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CertificateError(
            f"`docker {' '.join(arguments[:2])}` failed ({said}): start the engine, and build the "
            "image with `make images`."
        )
    return done.stdout
