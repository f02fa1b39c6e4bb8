"""Receipts: what sites signed about the privacy that they spent, and the ledgers' heads.

    runs/ledger-heads.json          site -> head of its ledger, over all runs
    runs/<run>/receipts.jsonl       one signed receipt per site and round

A head is given back with every instruction: a site whose ledger is older than that refuses to
train (client/ledger.py), so a ledger restored from an old backup cannot hide what was spent.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from google.protobuf.message import Message

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import CheckpointError
from fedqlora.files import write_durably


class Receipts:
    """The receipts of a run, and the heads of all runs beside it.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._receipts = run / "receipts.jsonl"
        self._heads = run.parent / "ledger-heads.json"

    def heads(self) -> dict[str, str]:
        """The newest head of each site's ledger that any run has seen.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            heads: dict[str, str] = json.loads(self._heads.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise CheckpointError(
                f"{self._heads} cannot be read; restore it from a backup, for without it an old "
                "ledger would not be noticed"
            ) from None
        return heads

    def keep(self, site: str, message: Message | None) -> None:
        """Write down what a verified reply says; durable when it returns.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not isinstance(message, pb.Description | pb.Update) or not message.ledger_head:
            return
        try:
            if isinstance(message, pb.Update):
                with self._receipts.open("ab") as file:
                    # A site's bytes: what is no line of its own is made one.
                    file.write(message.receipt.replace(b"\n", b" ") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            heads = {**self.heads(), site: message.ledger_head}
            write_durably(self._heads, json.dumps(heads, sort_keys=True).encode())
        except OSError as error:
            raise CheckpointError(
                f"{self._heads.parent} cannot be written ({error.strerror}); free space, then "
                "resume the run"
            ) from None
