"""The kit's `policy.toml`: every rule with what it means and its default, from the code itself."""

from __future__ import annotations

import json
import textwrap

from pydantic.fields import FieldInfo

from client.policy import Policy
from fedqlora.section import Section

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
    return _HEAD + "".join(_table(name, rule) for name, rule in Policy.model_fields.items())


def _table(name: str, rule: FieldInfo) -> str:
    """One table of the policy: a group of rules, or names that the hospital fills in."""
    kind = rule.annotation
    if not isinstance(kind, type) or not issubclass(kind, Section):
        return f"\n{_comment(rule.description or '')}[{name}]\n"
    rules = [
        f"{_comment(one.description or '')}{_assign(key, one)}\n"
        for key, one in kind.model_fields.items()
    ]
    return f"\n{_comment(kind.__doc__ or '')}[{name}]\n{''.join(rules)}"


def _assign(key: str, rule: FieldInfo) -> str:
    """A rule with its default as TOML; JSON's texts, numbers, booleans and lists are TOML's too."""
    value = [UNDECIDED] if rule.is_required() else rule.get_default(call_default_factory=True)
    # TOML has no word for nothing: a rule that is not set is left to be set.
    return f"# {key} =" if value is None else f"{key} = {json.dumps(value)}"


def _comment(text: str) -> str:
    """A docstring as comment lines."""
    lines = textwrap.wrap(" ".join(text.split()), 96)
    return "".join(f"# {line}\n" for line in lines)
