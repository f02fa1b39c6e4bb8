"""The import rules of the house: who may pull in torch, and who may know whom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"}
OURS = {"certs", "client", "demo", "server"}


def modules_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh process, after one import."""
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def top(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def light_modules() -> list[str]:
    files = [
        *(ROOT / "fedqlora").glob("*.py"),
        *(ROOT / "fedqlora" / "privacy").glob("*.py"),
        *(ROOT / "fedqlora" / "secure").glob("*.py"),
        ROOT / "fedqlora" / "codec",
    ]
    return sorted(
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in files
        if path.stem[0] != "_"
    )


@pytest.mark.parametrize("module", light_modules())
def test_fedqlora_outside_the_engine_needs_neither_torch_nor_ours(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not top(loaded) & (HEAVY | OURS)
    assert not any(name.startswith("fedqlora.engine") for name in loaded)


@pytest.mark.parametrize(
    "module",
    [
        "client.__main__",
        "client.app",
        "client.fetch",
        "client.supernode",
        "fedqlora.verify",
        "server.__main__",
        "server.app",
    ],
)
def test_what_needs_no_model_never_loads_torch(module: str) -> None:
    assert not top(modules_after(f"import {module}")) & (HEAVY | {"dp_accounting"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "other"), [("client", "server"), ("server", "client")], ids=["client", "server"]
)
def test_the_two_sides_import_neither_each_other_nor_the_demo(side: str, other: str) -> None:
    names = [
        f"{side}.{path.relative_to(ROOT / side).with_suffix('').as_posix().replace('/', '.')}"
        for path in (ROOT / side).rglob("*.py")
        if path.stem[0] != "_"
    ]
    assert names
    assert not {other, "demo"} & top(modules_after(f"import {', '.join(names)}"))


def test_certs_imports_nothing_of_ours() -> None:
    assert not top(modules_after("import certs.__main__")) & {
        "client",
        "demo",
        "fedqlora",
        "server",
    }
