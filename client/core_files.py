"""Core files: a process that sees records leaves none, whatever ends it."""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def forbid_core_files() -> None:
    """Keep this process's memory out of core files, and from other processes of its user.

    The limit alone is not enough: where `core_pattern` names a program, the kernel hands it the
    memory whatever the limit is, unless the process is not dumpable.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
