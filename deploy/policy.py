"""The kit's `policy.toml`: every rule with what it means and its default, from the code itself."""

from __future__ import annotations

import json
import textwrap

from pydantic.fields import FieldInfo

from client.policy import Policy
from fedqlora.config import Section

UNDECIDED = "none-approved-yet"
"""Stands where only the hospital can decide: nothing has this digest, so nothing is allowed."""

_HEAD = """\
# What this hospital allows, whatever the coordinator asks. You own this file. After a change:
# `./site stop`, then `./site up`. Every instruction outside it is refused with the rule's name, the
# refusal is written to the audit log, and no record is read. An unknown rule keeps the trainer from
# starting.
"""


def render_policy() -> str:
    """The text of a policy that loads and approves no base model yet."""
    parts = [_HEAD]
    for name, field in Policy.model_fields.items():
        section: type[Section] = field.annotation  # type: ignore[assignment]  # all are
        parts.append(f"\n{_comment(section.__doc__ or '')}[{name}]\n")
        for key, rule in section.model_fields.items():
            parts.append(f"{_comment(rule.description or '')}{key} = {_value(rule)}\n")
    return "".join(parts)


def _value(rule: FieldInfo) -> str:
    """A rule's default as TOML; JSON's texts, numbers, booleans and lists are TOML's as well."""
    return json.dumps([UNDECIDED] if rule.is_required() else rule.default)


def _comment(text: str) -> str:
    """A docstring as comment lines."""
    lines = textwrap.wrap(" ".join(text.split()), 96)
    return "".join(f"# {line}\n" for line in lines)
