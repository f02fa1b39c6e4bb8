"""A trainer that crashes leaves no core file, whatever the limits of its machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CRASH = """
import os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
if sys.argv[1] == "forbidden":
    from client.core_files import forbid_core_files
    forbid_core_files()
record = "Qxpatient-8841"
os.abort()
"""


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="this machine allows no core files"
)
def test_a_crash_leaves_a_core_file_only_where_none_is_forbidden(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    dumped = {}
    for mode in ("allowed", "forbidden"):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASH, mode],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=subprocess.DEVNULL,
        )
        _, status = os.waitpid(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        dumped[mode] = os.WCOREDUMP(status)
    assert dumped == {"allowed": True, "forbidden": False}
