"""New development keys begin new audit logs; the same keys go on with theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from certs.files import read_signing_key
from certs.site import make_all
from demo.earlier import SITES, put_aside
from fedqlora.audit import AuditLog
from fedqlora.errors import AuditError
from server.centre_log import FILE, CentreLog


def coordinator(certs: Path) -> Path:
    return certs / "coordinator" / "signing.key"


def test_logs_of_keys_that_are_gone_are_put_aside_together(tmp_path: Path) -> None:
    certs, runs = tmp_path / "certs", tmp_path / "runs"
    make_all(certs, ["a"])
    assert put_aside(runs, certs) is None
    CentreLog(runs, read_signing_key(coordinator(certs))).sign_head()
    (runs / SITES / "trainer-a").mkdir(parents=True)
    assert put_aside(runs, certs) is None, "these are its own"

    shutil.rmtree(certs)
    make_all(certs, ["a"])
    key = read_signing_key(coordinator(certs))
    with pytest.raises(AuditError, match="present key"):
        AuditLog(runs / FILE, key)
    aside = put_aside(runs, certs)
    assert aside is not None
    assert sorted(path.name for path in aside.iterdir()) == [SITES, "audit.head", FILE]
    assert list(runs.iterdir()) == [aside]
    CentreLog(runs, key)
