"""The leaderboard as a picture: a bar for each result, with its interval, and a line where nothing is gained. SVG, so
that nobody needs a library for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as Xml

from bench.speculation.table import name_of, ranked

_ROW, _BAR, _TOP = 26, 16, 44
"""Pixels: height of a row, of the bar in it, and where the first begins."""
_LABELS, _BARS, _VALUES = 330, 520, 90
"""Widths from left to right."""
_COLORS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e", "#97bbf5")
"""By batch size."""


def svg(results: Sequence[dict[str, Any]]) -> str:
    """The text of the file."""
    rows = ranked(results)
    most = max(of["all"]["speedup_high"] or of["all"]["speedup"] for of in rows)
    scale = _BARS / max(most, 1.0)
    width, height = _LABELS + _BARS + _VALUES, _TOP + _ROW * len(rows) + 12
    root = Xml.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    _add(root, "rect", width=width, height=height, fill="white")
    _text(root, _LABELS, 20, "Speed-up over no speculation, mean over the questions, and its 95 % interval")
    batches = sorted({result["batch"] for result in rows})
    for place, result in enumerate(rows):
        color = _COLORS[batches.index(result["batch"]) % len(_COLORS)]
        _row(root, _TOP + _ROW * place, result, scale, color)
    one = _LABELS + scale
    _add(root, "line", x1=one, x2=one, y1=_TOP - 8, y2=height - 8, stroke="black", stroke_dasharray="4 3")
    _text(root, one, _TOP - 10, "1x", anchor="middle")
    return Xml.tostring(root, encoding="unicode") + "\n"


def _row(root: Xml.Element, top: int, result: dict[str, Any], scale: float, color: str) -> None:
    of, middle = result["all"], top + _BAR / 2
    _text(root, _LABELS - 8, middle + 4, f"{name_of(result)}, batch {result['batch']}", anchor="end")
    _add(root, "rect", x=_LABELS, y=top, width=of["speedup"] * scale, height=_BAR, fill=color)
    end = of["speedup"] * scale
    if of["speedup_low"] is not None:
        low, high = of["speedup_low"] * scale, of["speedup_high"] * scale
        _add(root, "line", x1=_LABELS + low, x2=_LABELS + high, y1=middle, y2=middle, stroke="black")
        end = high
    _text(root, _LABELS + end + 6, middle + 4, f"{of['speedup']:.2f}x")


def _text(root: Xml.Element, x: float, y: float, text: str, anchor: str = "start") -> None:
    _add(root, "text", x=x, y=y, text_anchor=anchor).text = text


def _add(root: Xml.Element, tag: str, **attributes: object) -> Xml.Element:
    """Numbers to a tenth of a pixel, and - for _ in names."""
    written = {
        name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    return Xml.SubElement(root, tag, written)
