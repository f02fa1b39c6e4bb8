"""Programs that are forked from a process that has loaded torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from demo.forked import PROGRAMS, ForkedProcess, can_fork
from demo.program import Program


@pytest.mark.slow
@pytest.mark.skipif(not can_fork(), reason="with a GPU, and on macOS, programs start anew")
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_forked_program_has_arguments_a_log_and_a_status_of_its_own(
    tmp_path: Path, module: str
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    program = Program(
        module=module,
        arguments=["--nonsense"],
        log=log,
        environment={"PATH": os.environ["PATH"], "COLUMNS": "200"},
        folder=tmp_path,
    )
    process = ForkedProcess(program)
    assert process.wait() == 2
    assert process.poll() == 2
    assert log.read_text().startswith(f"before\nusage: python -m {module} ")
