"""Picture: how many texts of each chapter each hospital got, as an SVG file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from demo.codes import CHAPTERS
from demo.partition import Row
from fedqlora.errors import DataError


def draw(hospitals: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Write one bar a hospital, made of its chapters.

    Args:
        hospitals: each one's rows, with the column `chapter`.
        path: the file, replaced.

    Raises:
        DataError: it cannot be written.
    """
    names = list(hospitals)
    counts = [Counter(row["chapter"] for row in rows) for rows in hospitals.values()]
    figure = Figure(figsize=(9, 1.6 + 0.5 * max(len(names), 5)), layout="constrained")
    axes = figure.subplots()
    ends = [0] * len(names)
    colours = mpl.colormaps["tab20"]
    for index, chapter in enumerate(CHAPTERS.values()):
        widths = [count[chapter] for count in counts]
        axes.barh(names, widths, left=ends, label=chapter, color=colours(index))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("records")
    axes.set_ylabel("hospital")
    figure.legend(loc="outside right upper", fontsize="small")
    try:
        # Neither random ids nor a date: the same deal gives the same bytes.
        with mpl.rc_context({"svg.hashsalt": "fedqlora", "svg.fonttype": "none"}):
            figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free it or name another"
        ) from None
