"""Work on finished runs: `python -m server export RUN`, `python -m server ask RUN PROMPT`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedqlora.errors import CheckpointError, ConfigError, FedqloraError
from server.checkpoint import RunFolder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="merge the adapter into a standard checkpoint")
    export.add_argument("--out", type=Path, help="new folder; default RUN/merged")
    ask = commands.add_parser("ask", help="answers of the base and of the tuned model")
    for command in (export, ask):
        command.add_argument("run", type=Path, help="a finished run's folder")
        command.add_argument("--models", type=Path, default=Path(".cache/models"))
    ask.add_argument("prompt")
    ask.add_argument("--tokens", type=int, default=32, help="longest answer")
    options = parser.parse_args(arguments)
    try:
        folder = RunFolder(options.run)
        adapter = folder.path / "adapter"
        if not adapter.is_dir():
            raise CheckpointError(
                f"{folder.path} has no finished adapter; finish the run with `make resume RUN=...`"
            )
        if options.command == "export":
            _export(folder, options.models, options.out or folder.path / "merged")
        else:
            _ask(folder, options.models, options.prompt, options.tokens)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _export(folder: RunFolder, models: Path, out: Path) -> None:
    """Merge into a folder that is not there yet."""
    # Imported here: only these two commands need torch, and only after their input is checked.
    from fedqlora.engine.base import resolve_base
    from fedqlora.engine.export import merge

    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or choose another OUT")
    merge(resolve_base(folder.config().model.base, models), folder.path / "adapter", out)
    print(f"merged checkpoint: {out}")


def _ask(folder: RunFolder, models: Path, prompt: str, tokens: int) -> None:
    """Print both answers."""
    from fedqlora.engine.base import resolve_base
    from fedqlora.engine.export import answer

    if not prompt.strip():
        raise ConfigError('the prompt is empty; give one, as in PROMPT="Diagnosis: ..."')
    base = resolve_base(folder.config().model.base, models)
    before, after = answer(base, folder.path / "adapter", prompt, tokens)
    print(f"base:  {before.strip()}\ntuned: {after.strip()}")


if __name__ == "__main__":
    sys.exit(main())
