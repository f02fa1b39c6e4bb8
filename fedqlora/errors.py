"""Every error that a user of fedqlora can meet.

    FedqloraError            exit code 1: one sentence that says what, where and what to do
    ├── ConfigError          a run's TOML, a policy or a command line is wrong (exit code 2)
    ├── DataError            a site's data file cannot be used
    ├── ModelError           a base model or an adapter on it cannot be used
    ├── EnvelopeError        a signed message is not what it claims to be
    │   ├── SignatureError   wrong key, wrong addressee or altered bytes
    │   ├── ReplayError      older than the newest instruction of its run
    │   └── VersionError     the two sides speak different protocol versions
    ├── PrivacyError         a promise of privacy cannot be kept with this model, data or run
    ├── LedgerError          the record of privacy spent is lost, damaged, old or another site's
    ├── ReceiptError         a receipt's signature or epsilon does not hold
    ├── SecureAggregationError  a step of secure aggregation would reveal more than the sum
    │   └── EncryptionError     a step of homomorphic encryption would
    ├── PolicyRefusal        the site's policy forbids it; `rule` names the rule
    ├── UpdateError          a site's update has a wrong name, shape, range or digest
    ├── AuditError           an audit log cannot be written, or its chain is broken
    │   └── HistoryError     a log lacks a line that somebody has seen of it
    ├── CheckpointError      a run folder cannot be written or read
    └── FederationError      sites, SuperLink or trainer are missing or too late

A message is one sentence of plain text: what is wrong, where, and the next action. Foreign
errors are mapped to these at the seam where they appear. No message holds a record's text.
"""

from __future__ import annotations


class FedqloraError(Exception):
    """Base of all errors that are meant to be shown to a person."""

    exit_code = 1
    rule = ""
    """The rule that was broken, where there is one that a refusal can name."""


class ConfigError(FedqloraError):
    """A configuration file or a command line is wrong; nothing was started."""

    exit_code = 2


class DataError(FedqloraError):
    """A data file cannot be used; names file, line and column, never the text."""


class ModelError(FedqloraError):
    """A base model cannot be loaded, or cannot carry the configured adapter."""


class EnvelopeError(FedqloraError):
    """A signed message is not what it claims to be."""


class SignatureError(EnvelopeError):
    """The signature, the sender, the addressee or the payload digest does not fit."""


class ReplayError(EnvelopeError):
    """The message is older than the newest one accepted for its run."""


class VersionError(EnvelopeError):
    """The two sides speak different versions of the protocol."""


class PrivacyError(FedqloraError):
    """A promise of privacy cannot be kept: an epsilon, a layer or a batch rules it out."""


class LedgerError(FedqloraError):
    """The ledger of privacy spent cannot be used; without it nothing is trained privately."""


class ReceiptError(FedqloraError):
    """A receipt's signature, chain or epsilon does not hold."""


class SecureAggregationError(FedqloraError):
    """A step of secure aggregation is out of order, forged, or would reveal more than the sum.

    Args:
        rule: which of its rules was broken, such as `secure_aggregation.survivors`.
        message: one sentence that says what was asked and why it is not done.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class EncryptionError(SecureAggregationError):
    """The same of homomorphic encryption; rules such as `homomorphic_encryption.sum`."""


class PolicyRefusal(FedqloraError):
    """The site's policy forbids the instruction.

    Args:
        rule: the key in `policy.toml` that was broken, such as `limits.rank`.
        message: one sentence that says what was asked and what is allowed.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class UpdateError(FedqloraError):
    """A site's update does not match the adapter that was sent out, or is out of range."""


class AuditError(FedqloraError):
    """The audit log cannot be written or its chain is broken; what cannot be logged is not done."""


class HistoryError(AuditError):
    """An audit log was cut off or written anew: it lacks a head that was seen of it before."""

    rule = "audit.head"


class CheckpointError(FedqloraError):
    """A run folder cannot be written or read."""


class FederationError(FedqloraError):
    """Sites, SuperLink or trainer are missing, unreachable or too late."""
