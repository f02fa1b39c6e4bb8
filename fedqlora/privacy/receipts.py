"""Receipts: what a site signed about the privacy that one round spent, and how to check it.

A receipt is one JSON line, `{"receipt": {...}, "signature": hex}`; the signature is the site's
Ed25519 signature over a fixed prefix and the receipt's fields as sorted JSON.

Guarantees, restated in tests/client/test_private.py: a receipt that passes `check_receipts`
was signed by the given key, no field of it was changed, and its three epsilons are those that the
accountant finds for its figures, to 1e-6. A site that lies about its noise is not found out: a
receipt proves what a site claims.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from fedqlora.errors import ReceiptError
from fedqlora.privacy.accountant import LEAST_NOISE, MOST_NOISE, Spending, spent_epsilon
from fedqlora.section import Section

_PREFIX = b"fedqlora receipt\x00"
_EXACT = 1e-6

# What anybody signs is recomputed: figures that no site can have come by are not looked at further.
Rate = Annotated[float, Field(gt=0, le=1)]
Noise = Annotated[float, Field(ge=LEAST_NOISE, le=MOST_NOISE)]
Steps = Annotated[int, Field(ge=1, le=10**6)]
Delta = Annotated[float, Field(gt=0, lt=1)]


class Receipt(Section):
    """One site's account of one round."""

    mechanism: Literal["poisson-sampled gaussian, one unit added or removed"] = (
        "poisson-sampled gaussian, one unit added or removed"
    )
    """The mechanism and the neighbours that epsilon is about; no other is accounted for."""
    site: str
    """Who trained and signed."""
    run: str
    """The run."""
    round: int
    """The round, from 1."""
    cohort: str
    """Whose privacy was spent."""
    unit: Annotated[str, Field(pattern="^(example|patient)$")]
    """What epsilon is about: `example` or `patient`."""
    sampling_rate: Rate
    """Probability with which each unit entered a step."""
    noise_multiplier: Noise
    """Standard deviation of the noise over the clip norm."""
    clip_norm: float
    """Largest norm of one unit's share of a step."""
    steps: Steps
    """Steps of this round."""
    delta: Delta
    """Delta of the run's promise."""
    epsilon_round: float
    """Epsilon of this round alone, at `delta`."""
    run_steps: Steps
    """Steps of this run so far."""
    epsilon_run: float
    """Epsilon of this run so far, at `delta`."""
    cohort_delta: Delta
    """Delta at which the cohort's account is kept."""
    epsilon_cohort: float
    """Epsilon of all that the cohort has spent, in all runs, at `cohort_delta`."""
    cohort_spent: tuple[tuple[Rate, Noise, Steps], ...] = Field(max_length=1000)
    """All that the cohort has spent: sampling rate, noise multiplier, steps."""
    base_digest: str
    """Digest of the base model's files."""
    app_digest: str
    """Digest of the Flower app, as the signed instruction claims it: a trainer sees no app."""
    instruction_digest: str
    """SHA-256 of the signed instruction's header."""
    update_digest: str
    """SHA-256 of the update that left."""
    ledger_head: str
    """Head of the site's ledger with this round charged."""


def sign_receipt(receipt: Receipt, key: Ed25519PrivateKey) -> bytes:
    """The receipt's line, without its end."""
    signature = key.sign(_PREFIX + _content(receipt)).hex()
    values = receipt.model_dump(mode="json")
    return json.dumps({"receipt": values, "signature": signature}, sort_keys=True).encode()


def open_receipt(line: bytes, keys: Mapping[str, Ed25519PublicKey]) -> Receipt:
    """Verify one receipt.

    Args:
        line: what `sign_receipt` gave.
        keys: public signing keys by site.

    Raises:
        ReceiptError: it does not parse, its signature or one of its epsilons does not hold.
    """
    try:
        values = json.loads(line)
        receipt = Receipt.model_validate(values.pop("receipt"))
        signature = bytes.fromhex(values.pop("signature"))
        if values or _content(receipt) != _content_of(json.loads(line)["receipt"]):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise ReceiptError("a receipt does not parse; ask the site for it again") from None
    where = f"receipt of site {receipt.site[:40]}, run {receipt.run[:80]}, round {receipt.round}"
    if receipt.site not in keys:
        raise ReceiptError(f"{where}: no key of that site was given; give it with --key")
    try:
        keys[receipt.site].verify(signature, _PREFIX + _content(receipt))
    except InvalidSignature:
        raise ReceiptError(
            f"{where}: it is not what the site signed; ask the site for it again"
        ) from None
    _check_figures(receipt, where)
    return receipt


def check_receipts(path: Path, keys: Mapping[str, Ed25519PublicKey]) -> list[Receipt]:
    """Verify a file of receipts.

    Raises:
        ReceiptError: names the first receipt that does not hold, or one that has forgotten what
            an earlier one of its cohort had spent.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ReceiptError(
            f"{path} cannot be read ({error.strerror}); name a file of receipts"
        ) from None
    receipts = [open_receipt(line, keys) for line in lines]
    spent: dict[tuple[str, str], dict[tuple[float, float], int]] = {}
    for receipt in receipts:
        now = {(rate, noise): steps for rate, noise, steps in receipt.cohort_spent}
        before = spent.get((receipt.site, receipt.cohort), {})
        if any(now.get(kind, 0) < steps for kind, steps in before.items()):
            raise ReceiptError(
                f"{path}: site {receipt.site}'s receipt for round {receipt.round} of run "
                f"{receipt.run} has forgotten what an earlier one spent; ask for its ledger"
            )
        spent[receipt.site, receipt.cohort] = now
    return receipts


def _check_figures(receipt: Receipt, where: str) -> None:
    """Recompute the three epsilons, and see that the cohort's account holds the run's."""

    def steps(count: int) -> Spending:
        return Spending(
            sampling_rate=receipt.sampling_rate,
            noise_multiplier=receipt.noise_multiplier,
            steps=count,
        )

    everything = [
        Spending(sampling_rate=rate, noise_multiplier=noise, steps=count)
        for rate, noise, count in receipt.cohort_spent
    ]
    held = sum(
        one.steps
        for one in everything
        if (one.sampling_rate, one.noise_multiplier)
        == (receipt.sampling_rate, receipt.noise_multiplier)
    )
    if not receipt.steps <= receipt.run_steps <= held:
        raise ReceiptError(f"{where}: the cohort's account lacks this round; ask for the ledger")
    for name, claimed, spendings, delta in (
        ("epsilon_round", receipt.epsilon_round, [steps(receipt.steps)], receipt.delta),
        ("epsilon_run", receipt.epsilon_run, [steps(receipt.run_steps)], receipt.delta),
        ("epsilon_cohort", receipt.epsilon_cohort, everything, receipt.cohort_delta),
    ):
        found = spent_epsilon(spendings, delta)
        if not math.isclose(found, claimed, rel_tol=0, abs_tol=_EXACT):
            raise ReceiptError(
                f"{where}: {name} is {claimed:.6f}, its figures give {found:.6f}; do not accept it"
            )


def _content(receipt: Receipt) -> bytes:
    return _content_of(receipt.model_dump(mode="json"))


def _content_of(values: object) -> bytes:
    return json.dumps(values, sort_keys=True).encode()
