"""Earlier: audit logs of development keys that are gone, put aside so that new keys can begin.

Development keys may be removed and made anew. A log goes on with the key that signs its head, and
the centre's log and the sites' know each other, so all of them begin anew together.
"""

from __future__ import annotations

import time
from pathlib import Path

from certs.files import read_signing_key
from fedqlora.errors import AuditError
from fedqlora.head import head_path, read_head
from server.centre_log import FILE

SITES = ".sites"
"""Folder beside the run folders: the state of trainers and evaluator, which outlives a run."""

_TOGETHER = (FILE, head_path(Path(FILE)).name, "ledger-heads.json", SITES)


def put_aside(runs: Path, certs: Path) -> Path | None:
    """Move the logs of other keys out of the way.

    Args:
        runs: folder of run folders.
        certs: what `python -m certs make --out` made.

    Returns:
        The folder that has them now; None if there are none, or they are of these keys.
    """
    head = head_path(runs / FILE)
    if not head.exists():
        return None
    try:
        read_head(head, read_signing_key(certs / "coordinator" / "signing.key").public_key())
    except AuditError:
        aside = runs / f".earlier-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        aside.mkdir()
        for name in _TOGETHER:
            if (runs / name).exists():
                (runs / name).rename(aside / name)
        return aside
    return None
