"""Receipts: what sites signed about the privacy that they spent, and the ledgers' heads.

    runs/ledger-heads.json          site -> head of its ledger, over all runs
    runs/<run>/receipts.jsonl       one signed receipt per site and round

A head is given back with every instruction: a site whose ledger is older than that refuses to
train (client/ledger.py), so a ledger restored from an old backup cannot hide what was spent.

Guarantees, each restated by a test in tests/server/test_receipts.py: in a private run an update
counts, and its receipt is kept, only if the receipt is the site's own, about this very update and
instruction, with the run's settings, and its epsilons are those of its figures and within the
promise.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedqlora import protocol_pb2 as pb
from fedqlora.audit import digest_of
from fedqlora.config import RunConfig
from fedqlora.errors import CheckpointError, ConfigError, ReceiptError
from fedqlora.files import write_durably
from fedqlora.update import read_content
from server.answer import INVALID, Answer
from server.exchange import Exchange

if TYPE_CHECKING:
    from fedqlora.privacy.receipts import Receipt


class Receipts:
    """The receipts of a run, and the heads of all runs beside it.

    Args:
        run: the run folder.
        config: the run.
        exchange: knows the run's name, the sites' keys and the app.

    Raises:
        ConfigError: the run is private, and what receipts are recomputed with is not installed.
    """

    def __init__(self, run: Path, config: RunConfig, exchange: Exchange) -> None:
        self._receipts = run / "receipts.jsonl"
        self._heads = run.parent / "ledger-heads.json"
        self._config = config
        self._exchange = exchange
        self._private = config.privacy.unit != "none"
        if self._private and importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                "receipts of a run with privacy.unit are recomputed with dp-accounting, which is "
                "not installed here; install fedqlora with the extra `engine`"
            )

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

    def take(self, answer: Answer, round_: int, base_digest: str) -> Answer:
        """Check and keep the receipt of an update; durable when it returns.

        Args:
            answer: a verified reply to a training instruction, or why there is none.
            round_: the round that is going on.
            base_digest: of the base model that all sites have.

        Returns:
            The answer; without its update where the receipt is wrong, and then nothing is kept.

        Raises:
            CheckpointError: it cannot be written.
        """
        update = answer.message
        if not self._private or not isinstance(update, pb.Update):
            return answer
        try:
            self._check(answer, update, round_ - answer.stale, base_digest)
        except ReceiptError as error:
            return replace(answer, message=None, failure=INVALID, reason=str(error))
        try:
            with self._receipts.open("ab") as file:
                file.write(update.receipt + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None
        self.keep_head(answer.site, update.ledger_head)
        return answer

    def keep_head(self, site: str, head: str) -> None:
        """Write down where a site says that its ledger stands; empty where it keeps none.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not head:
            return
        try:
            heads = {**self.heads(), site: head}
            write_durably(self._heads, json.dumps(heads, sort_keys=True).encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _check(self, answer: Answer, update: pb.Update, round_: int, base_digest: str) -> None:
        """Refuse a receipt that is not about this update, or breaks the run's promise.

        Raises:
            ReceiptError: says in what.
        """
        # Loaded here: the accounting takes a second, and only private runs need it.
        from fedqlora.privacy.accountant import default_delta
        from fedqlora.privacy.receipts import open_receipt

        if b"\n" in update.receipt:
            raise ReceiptError(
                "the update's receipt is not one line; bring the site to our release"
            )
        receipt = open_receipt(update.receipt, {answer.site: self._exchange.key_of(answer.site)})
        privacy, training = self._config.privacy, self._config.training
        expected = {
            "run": self._exchange.run,
            "round": round_,
            "unit": privacy.unit,
            "clip_norm": privacy.clip_norm,
            "steps": training.steps,
            "base_digest": base_digest,
            "app_digest": self._exchange.app,
            "instruction_digest": answer.instruction.hex(),
            "update_digest": digest_of(read_content(update)),
            "ledger_head": update.ledger_head,
        }
        for name, value in expected.items():
            if getattr(receipt, name) != value:
                raise _wrong(receipt, name, f"it should be {value}")
        # No site with fewer than three units trains privately.
        units = max(round(training.batch_examples / receipt.sampling_rate), 3)
        delta = privacy.delta or default_delta(units)
        if not math.isclose(receipt.delta, delta, rel_tol=1e-9):
            raise _wrong(receipt, "delta", f"the run's is {delta:g}")
        if receipt.epsilon_run > (privacy.epsilon or math.inf):
            raise _wrong(receipt, "epsilon_run", f"the run promises {privacy.epsilon:g}")

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._heads.parent} cannot be written ({error.strerror}); free space, then resume "
            "the run"
        )


def _wrong(receipt: Receipt, name: str, why: str) -> ReceiptError:
    return ReceiptError(
        f"the receipt of site {receipt.site} for round {receipt.round} has {name} "
        f"{str(getattr(receipt, name))[:80]}, and {why}; its update does not count"
    )
