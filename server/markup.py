"""Markup: HTML and SVG in which every text and attribute is escaped unless it is markup already.

Guarantee: what a site says (its name, its versions, its reasons) reaches a page as text only. A
plain `str` is always escaped; only `element` and `join` make the `Markup` that is not.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = {"meta"}


class Markup(str):
    """Finished markup. Made by `element` and `join` and, for constants, by hand."""

    __slots__ = ()


def element(
    tag: str, /, *children: str | Iterable[Markup], **attributes: str | float | None
) -> Markup:
    """One element.

    Args:
        tag: its name.
        children: text, which is escaped, or markup.
        attributes: values are escaped; None leaves one out. `class_` is `class`, and another
            underscore a hyphen.
    """
    opening = tag + "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(children)}</{tag}>")


def join(parts: Iterable[str | Iterable[Markup]]) -> Markup:
    """Texts, which are escaped, and markup, one after the other."""
    return Markup("".join(_escape(part) if isinstance(part, str) else join(part) for part in parts))


def table(
    head: Iterable[str], rows: Iterable[Iterable[str]], *, label: str, words: int = 1
) -> Markup:
    """A table that scrolls sideways in a box of its own, so that a phone's page does not.

    Args:
        head: a heading for each column.
        rows: cells of each row; the first is the row's heading.
        label: what it shows, for whoever cannot see it.
        words: so many columns hold text; those after them hold numbers and stand on the right.
    """
    lines = [
        element(
            "tr",
            *(
                element(
                    "td" if index else "th",
                    cell,
                    class_="number" if index >= words else None,
                    scope=None if index else "row",
                )
                for index, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    top = [
        element("th", cell, class_="number" if index >= words else None, scope="col")
        for index, cell in enumerate(head)
    ]
    whole = element("table", element("thead", element("tr", *top)), element("tbody", *lines))
    # A keyboard has to reach what it scrolls.
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _escape(text: str) -> str:
    return text if isinstance(text, Markup) else html.escape(text)


def _text(value: str | float) -> str:
    """An attribute's value; coordinates need no more than two decimals."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
