"""Validity: when what ends is to be renewed, and how many days left are too few."""

from __future__ import annotations

import datetime

from certs.report import Report

WARNING_DAYS = 30
FAILURE_DAYS = 7
CRL_WARNING_DAYS = 10


def renewal_due(start: datetime.datetime, end: datetime.datetime) -> datetime.datetime:
    """Return the moment from which a certificate or list should be renewed: two thirds on."""
    return start + (end - start) * 2 / 3


def is_due(start: datetime.datetime, end: datetime.datetime, now: datetime.datetime) -> bool:
    """Tell whether it is time to renew what is valid from `start` to `end`."""
    return now >= renewal_due(start, end)


def judge_certificate(
    report: Report,
    name: str,
    start: datetime.datetime,
    end: datetime.datetime,
    now: datetime.datetime,
    *,
    leaf: bool,
    advice: str | None = None,
) -> bool:
    """Record what is wrong, or soon will be, with a certificate's dates.

    Args:
        report: gets the warning or the problem.
        name: whose certificate it is.
        start: when it starts to be valid.
        end: when it ends.
        now: the moment to judge for.
        leaf: whether it is renewed by rotation, which is due after two thirds of its time.
        advice: what to do about it; the command that usually renews it if None.

    Returns:
        Whether it is valid now.
    """
    days = (end - now).days
    advice = advice or ("run rotate" if leaf else "run rollover")
    if now < start:
        report.require(
            False,
            f"The certificate of {name} is not valid before {start:%Y-%m-%d %H:%M} UTC; "
            f"set this machine's clock.",
        )
    elif end < now:
        report.require(False, f"The certificate of {name} ended on {end:%Y-%m-%d}; {advice}.")
    elif days < FAILURE_DAYS:
        report.require(False, f"The certificate of {name} ends in {days} days; {advice} now.")
    elif days < WARNING_DAYS:
        report.warnings.append(f"The certificate of {name} ends in {days} days; {advice}.")
    elif leaf and is_due(start, end, now):
        report.warnings.append(f"The certificate of {name} is due for renewal; {advice}.")
    return start <= now <= end


def judge_list(report: Report, path: str, end: datetime.datetime, now: datetime.datetime) -> None:
    """Record that a revocation list has ended, or that two thirds of its time are over.

    Args:
        report: gets the warning or the problem.
        path: where the list is.
        end: when it ends.
        now: the moment to judge for.
    """
    days = (end - now).days
    if end < now:
        report.require(
            False, f"The revocation list in {path} ended on {end:%Y-%m-%d}; run make or rotate."
        )
    elif days < CRL_WARNING_DAYS:
        report.warnings.append(
            f"The revocation list in {path} ends in {days} days; run make or rotate."
        )
