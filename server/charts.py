"""Charts: lines, columns and rows as small SVG pictures, pure functions of their numbers.

Colours are the page's classes `s0` to `s7`, so that one picture serves both colour schemes; a
series is told apart by its marker too. A legend is text beside the picture: it wraps on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.markup import Markup, element
from server.units import figure, ticks

COLOURS = 8
"""Series that can be told apart; what has more is drawn as quiet lines and their median."""

_WIDTH, _HEIGHT = 400.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 14.0, 26.0, 40.0
_ROW = 26.0
_ROW_NAME, _ROW_VALUE = 92.0, 62.0
_NOTHING = Markup("")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    """As in the legend."""
    points: Sequence[tuple[float, float | None]]
    """x and y in the order of the line; a missing y breaks it."""
    quiet: bool = False
    """Thin and grey, without an entry in the legend."""


def lines(title: str, series: Sequence[Series], *, x: str, y: str, zero: bool = False) -> Markup:
    """A line chart.

    Args:
        title: stands above it.
        series: its lines; at least one has a point.
        x: what the horizontal axis measures, with its unit.
        y: what the vertical axis measures, with its unit.
        zero: whether the vertical axis starts at zero.
    """
    known = [(a, b) for one in series for a, b in one.points if b is not None]
    xs, ys = [a for a, _ in known], [b for _, b in known]
    left, right = min(xs), max(xs)
    ticks_y = ticks(min(0.0, *ys) if zero else min(ys), max(ys))
    whole = all(value == int(value) for value in xs)
    ticks_x = [t for t in ticks(left, right) if left <= t <= right]
    if whole and right - left <= 10:
        ticks_x = [float(t) for t in range(int(left), int(right) + 1)]
    elif whole:
        ticks_x = [t for t in ticks_x if t == int(t)]
    if left == right:
        ticks_x, left, right = [left], left - 1, right + 1

    def place(a: float, b: float) -> tuple[float, float]:
        return (
            _scale(a, left, right, _LEFT + 8, _WIDTH - _RIGHT),
            _scale(b, ticks_y[0], ticks_y[-1], _HEIGHT - _BOTTOM, _TOP),
        )

    drawn = [
        *(_rule(place(left, tick)[1], figure(tick)) for tick in ticks_y),
        *(_below(place(tick, ticks_y[0])[0], figure(tick)) for tick in ticks_x),
    ]
    loud = 0
    for one in sorted(series, key=lambda each: not each.quiet):
        style = "quiet" if one.quiet else f"s{loud % COLOURS}"
        drawn.append(_line(one, place, loud, style))
        loud += not one.quiet
    names = [one.name for one in series if not one.quiet]
    first = [f"{one.name} {figure(_last(one))}" for one in series if not one.quiet][:COLOURS]
    summary = f"{title}. {y} against {x}. Last values: {', '.join(first)}."
    return _frame(title, drawn, summary, x=x, y=y, legend=_legend(names))


def columns(
    title: str,
    values: Mapping[str, Sequence[float]],
    *,
    names: Sequence[str],
    x: str,
    y: str,
) -> Markup:
    """Stacked columns.

    Args:
        title: stands above it.
        values: column -> the height of each of its parts, from the bottom.
        names: of the parts, as in the legend.
        x: what a column is.
        y: what the vertical axis measures, with its unit.
    """
    ticks_y = ticks(0.0, max(sum(parts) for parts in values.values()))
    slot = (_WIDTH - _RIGHT - _LEFT) / len(values)
    width = min(44.0, slot * 0.7)
    skip = math.ceil(len(values) / 10)

    def height(value: float) -> float:
        return _scale(value, 0.0, ticks_y[-1], _HEIGHT - _BOTTOM, _TOP)

    drawn = [_rule(height(tick), figure(tick)) for tick in ticks_y]
    for index, (column, parts) in enumerate(values.items()):
        middle = _LEFT + slot * (index + 0.5)
        if index % skip == 0:
            drawn.append(_below(middle, column))
        bottom = 0.0
        for number, part in enumerate(parts):
            low, high = height(bottom), height(bottom + part)
            hint = element("title", f"{x} {column}, {names[number]}: {figure(part)}")
            place = {"x": middle - width / 2, "y": high, "width": width, "height": low - high}
            drawn.append(element("rect", hint, class_=f"bar s{number}", **place))
            bottom += part
    totals = ", ".join(f"{column} {figure(sum(parts))}" for column, parts in values.items())
    summary = f"{title}. {y} by {x}: {totals}."
    return _frame(title, drawn, summary, x=x, y=y, legend=_legend(names, solid=True))


def rows(title: str, values: Mapping[str, float], *, unit: str) -> Markup:
    """One bar a row, with its share of the whole.

    Args:
        title: stands above it.
        values: row -> length.
        unit: of the lengths.
    """
    longest, whole = max(values.values()) or 1.0, sum(values.values()) or 1.0
    space = _WIDTH - _ROW_NAME - _ROW_VALUE
    drawn = []
    for index, (name, value) in enumerate(values.items()):
        top = index * _ROW + 4
        hint = element("title", f"{name}: {figure(value)} {unit}")
        short = name if len(name) <= 12 else name[:11] + "…"
        drawn += [
            element("text", short, x=_ROW_NAME - 8, y=top + 13, class_="tick", text_anchor="end"),
            element(
                "rect", hint, class_="bar s0", x=_ROW_NAME, y=top, height=18.0,
                width=max(1.0, space * value / longest),
            ),
            element(
                "text", f"{value / whole:.0%}", class_="tick", y=top + 13,
                x=_ROW_NAME + max(1.0, space * value / longest) + 6,
            ),
        ]  # fmt: skip
    said = ", ".join(f"{name} {figure(value)}" for name, value in values.items())
    return _figure(title, drawn, f"{title}, in {unit}: {said}.", len(values) * _ROW + 4)


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low) * (end - start)


def _last(series: Series) -> float:
    return next((b for _, b in reversed(series.points) if b is not None), math.nan)


def _rule(height: float, label: str) -> Markup:
    """A horizontal rule and its number."""
    return element(
        "g",
        element(
            "line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=height, y2=height, class_="grid"
        ),
        element("text", label, x=_LEFT - 7, y=height + 4, class_="tick", text_anchor="end"),
    )  # fmt: skip


def _below(place: float, label: str) -> Markup:
    """A number under the horizontal axis."""
    down = _HEIGHT - _BOTTOM + 16
    return element("text", label, x=place, y=down, class_="tick", text_anchor="middle")


def _line(
    one: Series,
    place: Callable[[float, float], tuple[float, float]],
    number: int,
    style: str,
) -> Markup:
    """The pieces of a line, and a marker at every point."""
    pieces: list[list[tuple[float, float]]] = [[]]
    marks = []
    for a, b in one.points:
        if b is None:
            pieces.append([])
            continue
        spot = place(a, b)
        pieces[-1].append(spot)
        hint = element("title", f"{one.name}, {figure(a)}: {figure(b)}")
        if not one.quiet:
            marks.append(_mark(number, *spot, hint))
    drawn = [
        element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in piece), class_="line")
        for piece in pieces
        if len(piece) > 1
    ]
    return element("g", *drawn, *marks, class_=style)


def _mark(number: int, x: float, y: float, hint: Markup = _NOTHING) -> Markup:
    """A marker: disc, square, triangle or diamond, so that colour is not all that tells."""
    outlines = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 5:.1f}l4.6 8h-9.2z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    )
    return element("path", hint, d=outlines[number % len(outlines)], class_="mark")


def _frame(
    title: str, drawn: Sequence[Markup], summary: str, *, x: str, y: str, legend: Markup
) -> Markup:
    """A picture with both axes named."""
    axes = [
        element("text", y, x=4, y=13, class_="axis"),
        element(
            "text", x, x=(_LEFT + _WIDTH) / 2, y=_HEIGHT - 5, class_="axis", text_anchor="middle"
        ),
    ]
    return _figure(title, [*axes, *drawn], summary, _HEIGHT, legend)


def _figure(
    title: str, drawn: Sequence[Markup], summary: str, height: float, legend: Markup = _NOTHING
) -> Markup:
    picture = element(
        "svg", *drawn, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", aria_label=summary
    )
    return element("figure", element("figcaption", title), picture, legend)


def _legend(names: Sequence[str], *, solid: bool = False) -> Markup:
    """The names beside a marker, or a block of colour; one name needs no legend."""
    if len(names) < 2:
        return _NOTHING
    entries = []
    for number, name in enumerate(names):
        block = element("rect", x=5, y=2, width=12, height=10, class_="bar")
        stroke = element("line", x1=0, x2=22, y1=7, y2=7, class_="line")
        sign = [block] if solid else [stroke, _mark(number, 11, 7)]
        swatch = element("svg", *sign, viewBox="0 0 22 14", aria_hidden="true")
        entries.append(element("li", swatch, name, class_=f"s{number % COLOURS}"))
    return element("ul", *entries, class_="legend")
