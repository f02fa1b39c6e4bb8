"""A hospital's kit: everything that a site needs but its keys and its records, signed.

python -m deploy.kit --site a --superlink superlink.example.org:9092 --image fedqlora-client:cpu

fedqlora-site-a-0.1.0.tar.gz, and beside it .sha256 and .sig
    README.md data-flow.md     quick start; the page for the data-protection officer
    site                       the program that the hospital calls
    compose.yml .env           the site's services; what the coordinator sets
    settings.env policy.toml   what the hospital sets and allows
    trust/ roster/             root, coordinator's key, this kit's key; the signed roster
    manifest.json sbom/        image, least versions; the image's parts
    images/                    the image itself, in the air-gapped variant
    SHA256SUMS SHA256SUMS.sig  SHA-256 of every file, and the signature over them
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509

from certs.files import (
    CURRENT,
    CertificateError,
    MisuseError,
    encode_public,
    read_certificates,
    read_signing_key,
)
from certs.handshake import read_address
from certs.names import LOCAL_HOSTS, check_sites, list_names, read_host
from certs.parties import list_sites
from certs.roster import read_roster, sign_roster
from certs.trust import read_trust
from deploy.archive import Member, digest_file, refuse_private_keys, write_archive
from deploy.image import Image, read_image, save_image
from deploy.policy import render_policy
from deploy.preflight import OLDEST_COMPOSE, OLDEST_ENGINE
from deploy.sbom import render_sbom
from deploy.signature import encode_kit_public, fingerprint_key, open_kit_key, sign_digest
from fedqlora import VERSION

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "deploy" / "site"

OLDEST_DRIVER = "580.65.06"
"""NVIDIA's first driver for CUDA 13.0, which the CUDA image carries (CUDA 13.0 release notes)."""

IMAGE_ARCHIVE = "images/client.tar"
SUMS = "SHA256SUMS"
SUMS_SIGNATURE = "SHA256SUMS.sig"

# What the kit fixes in its .env; all other lines of .env.example are the hospital's settings.
_FIXED = (
    "FEDQLORA_SITE",
    "FEDQLORA_SUPERLINK",
    "FEDQLORA_CLIENT_IMAGE",
    "FEDQLORA_POLICY",
    "FEDQLORA_KEYS_SUPERNODE",
    "COMPOSE_FILE",
)


def build_kit(
    certs: Path,
    site: str,
    superlink: str,
    image: Image,
    out: Path,
    *,
    release: str = VERSION,
    image_archive: Path | None = None,
    extra: Mapping[str, Member] | None = None,
) -> Path:
    """Write a site's kit, its SHA-256 and its signature; the same input gives the same bytes.

    Args:
        certs: the folder of all parties; gets the key that signs kits where it lacks one.
        site: the site's name; it need not have keys yet.
        superlink: HOST:PORT under which the site reaches the SuperLink.
        image: the site's image.
        out: folder for the three files; made if missing.
        release: names this kit among those of the site, such as 0.1.0 or 0.1.0-2.
        image_archive: what `docker save` wrote, for a site that reaches no registry.
        extra: further files of the coordinator, by path below the kit's folder.

    Returns:
        The archive's path.

    Raises:
        MisuseError: the name, the release or the address cannot be.
        CertificateError: keys are missing, the site is revoked, a member is or holds a private
            key, or the disk fails. In all cases no archive was left.
    """
    _check_names(certs, site, superlink, release)
    key = open_kit_key(certs)
    members = {**_collect(certs, site, superlink, image, release), **(extra or {})}
    members["trust/kit.pub"] = Member(encode_kit_public(key))
    if image_archive is not None:
        members[IMAGE_ARCHIVE] = Member(image_archive)
    manifest = _describe(site, superlink, image, release, with_archive=image_archive is not None)
    members["manifest.json"] = Member(manifest)
    refuse_private_keys(members)
    sums = "".join(f"{one.digest()}  {name}\n" for name, one in sorted(members.items())).encode()
    members[SUMS] = Member(sums)
    signature = sign_digest(key, bytes.fromhex(members[SUMS].digest()))
    members[SUMS_SIGNATURE] = Member(signature)
    name = f"fedqlora-site-{site}-{release}"
    path = out / f"{name}.tar.gz"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out) as scratch:
            made = Path(scratch) / path.name
            write_archive(made, name, members)
            digest = digest_file(made)
            beside = {
                ".sha256": f"{digest.hex()}  {path.name}\n".encode(),
                ".sig": sign_digest(key, digest),
            }
            for suffix, content in beside.items():
                path.with_name(path.name + suffix).write_bytes(content)
            made.replace(path)
    except OSError as error:
        raise CertificateError(
            f"{path} cannot be written ({error.strerror}); free space or name another --out."
        ) from error
    return path


def _check_names(certs: Path, site: str, superlink: str, release: str) -> None:
    """Refuse what would give a kit that no site can use."""
    check_sites([site])
    if not re.fullmatch(r"[0-9][0-9A-Za-z.+-]{0,31}", release):
        raise MisuseError(
            f"{release!r} cannot name a release; begin with a digit and use up to 32 of 0-9, a-z, "
            "A-Z, dot, plus and minus."
        )
    host, _ = read_address(superlink)
    if site in list_sites(certs, revoked=True) and site not in list_sites(certs):
        raise CertificateError(
            f"Site {site} is revoked; remove {certs / 'sites' / site} first if it may come again."
        )
    covered = list_names(_read_leaf(certs))
    if read_host(host) not in covered:
        raise MisuseError(
            f"The SuperLink's certificate is not valid for {host} but for {', '.join(covered)}; "
            f"name one of these, or run `python -m certs rotate --superlink --host {host} "
            f"--out {certs}` first."
        )


def choose_superlink(certs: Path) -> str:
    """The address that kits name unless told: the first of the certificate's names from outside.

    Raises:
        CertificateError: the certificate cannot be read.
    """
    names = list_names(_read_leaf(certs))
    return f"{next((one for one in names if one not in LOCAL_HOSTS), names[0])}:9092"


def _read_leaf(certs: Path) -> x509.Certificate:
    """The SuperLink's certificate that is in use."""
    return read_certificates(certs / "superlink" / CURRENT / "server.crt")[0]


def _collect(
    certs: Path, site: str, superlink: str, image: Image, release: str
) -> dict[str, Member]:
    """The files of a kit that are neither made at its end nor signatures."""
    signer = read_signing_key(certs / "coordinator" / "signing.key")
    # Read and signed anew rather than copied: nothing that is not a roster gets in.
    roster = sign_roster(read_roster(certs / "coordinator", signer.public_key()), signer)
    fixed, settings = split_settings(site, superlink, image)
    page = (ROOT / "docs" / "data-flow.md").read_text(encoding="utf-8")
    texts = {
        "README.md": (TEMPLATE / "README.md").read_text(encoding="utf-8"),
        "data-flow.md": page + _describe_kit(site, superlink, image, release),
        "compose.yml": (TEMPLATE / "compose.yml").read_text(encoding="utf-8"),
        "compose.gpu.yml": (TEMPLATE / "compose.gpu.yml").read_text(encoding="utf-8"),
        ".env": fixed,
        "settings.env": settings,
        "policy.toml": render_policy(),
    }
    return {
        **{name: Member(text.encode()) for name, text in texts.items()},
        "site": Member((TEMPLATE / "site").read_bytes(), executable=True),
        "trust/root.crt": Member(read_trust(certs).roots),
        "trust/coordinator.pub": Member(encode_public(signer.public_key())),
        **{f"roster/{name}": Member(content) for name, content in roster.items()},
        "sbom/client.cdx.json": Member(render_sbom(image)),
    }


def split_settings(site: str, superlink: str, image: Image) -> tuple[str, str]:
    """What the coordinator sets, and what is left of .env.example for the hospital."""
    values = {
        "FEDQLORA_SITE": site,
        "FEDQLORA_SUPERLINK": superlink,
        "FEDQLORA_CLIENT_IMAGE": image.reference,
        "DEVICE": image.device,
        # Where `./site` makes them, below the site's folder.
        "FEDQLORA_POLICY": "./policy",
        "FEDQLORA_KEYS_SUPERNODE": "./keys/supernode",
        "FEDQLORA_KEYS_TRAINER": "./keys/trainer",
    }
    fixed = "# Set by the coordinator and signed; what the hospital sets is in its settings.env.\n"
    fixed += "".join(f"{key}={value}\n" for key, value in values.items())
    blocks = (TEMPLATE / ".env.example").read_text(encoding="utf-8").split("\n\n")
    own = [
        block for block in blocks[1:] if not re.search(rf"^(# )?({'|'.join(_FIXED)})=", block, re.M)
    ]
    if image.device == "cuda":
        own.append(
            "# Which NVIDIA GPU: an index or an id, as `nvidia-smi -L` prints them.\nFEDQLORA_GPU=0"
        )
    head = "# What the hospital sets. Relative paths start at this file's folder.\n\n"
    return fixed, head + "\n\n".join(one.strip() for one in own) + "\n"


def _describe(
    site: str, superlink: str, image: Image, release: str, *, with_archive: bool
) -> bytes:
    """The manifest: one value a line, so that a shell can read it."""
    content = {
        "site": site,
        "release": release,
        "superlink": superlink,
        "version": image.version,
        "image": {
            "reference": image.reference,
            "id": image.id,
            "device": image.device,
            "revision": image.revision,
            "created": image.created,
            "bytes": image.bytes,
            "archive": IMAGE_ARCHIVE if with_archive else None,
        },
        "needs": {
            "engine": ".".join(f"{number:02}" for number in OLDEST_ENGINE),
            "compose": ".".join(str(number) for number in OLDEST_COMPOSE),
            "driver": OLDEST_DRIVER if image.device == "cuda" else None,
        },
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def _describe_kit(site: str, superlink: str, image: Image, release: str) -> str:
    """The end of the data-flow page: which image and addresses this kit is about."""
    return (
        f"\n## This kit\n\nSite {site}, release {release}. The site connects to {superlink} and "
        f"nowhere else.\n\n- image: `{image.reference}`\n- id: `{image.id}`\n- built from revision "
        f"`{image.revision}`, for {image.device}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a kit and say what it is; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--site", required=True, help="the site's name")
    parser.add_argument("--superlink", help="HOST:PORT of the SuperLink (default: from its names)")
    parser.add_argument("--image", default="fedqlora-client:cpu", help="the site's image")
    parser.add_argument("--images", action="store_true", help="put the image itself into the kit")
    parser.add_argument("--release", default=VERSION, help=f"name of this kit (default: {VERSION})")
    parser.add_argument("--certs", type=Path, default=Path("certs/out"), help="all parties' keys")
    parser.add_argument("--out", type=Path, default=Path("build/kits"), help="folder to write to")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        superlink = options.superlink or choose_superlink(options.certs)
        _check_names(options.certs, options.site, superlink, options.release)
        image = read_image(options.image)
        with tempfile.TemporaryDirectory(prefix="fedqlora-kit.") as scratch:
            saved = Path(scratch) / "client.tar" if options.images else None
            if saved is not None:
                save_image(image, saved)
            path = build_kit(
                options.certs,
                options.site,
                superlink,
                image,
                options.out,
                release=options.release,
                image_archive=saved,
            )
        key = open_kit_key(options.certs)
    except CertificateError as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    told = {
        "kit": str(path),
        "sha256": digest_file(path).hex(),
        "signature": f"{path}.sig",
        "fingerprint": fingerprint_key(key),
        "image": image.id,
        "contains private keys": "none",
    }
    if options.json:
        print(json.dumps(told, indent=2))
    else:
        for name, value in told.items():
            print(f"{name}: {value}")
        print("Tell the hospital the fingerprint by telephone or on paper, not with the kit.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
