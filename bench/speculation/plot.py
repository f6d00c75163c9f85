"""The leaderboard as a picture: a bar for each result, with its interval, and a line where nothing is gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.speculation.table import name_of, ranked
from core.svg import COLORS, Picture

_ROW, _BAR, _TOP = 26, 16, 44
"""Pixels: height of a row, of the bar in it, and where the first begins."""
_LABELS, _BARS, _VALUES = 330, 520, 90
"""Widths from left to right."""


def svg(results: Sequence[dict[str, Any]]) -> str:
    """The text of the file."""
    rows = ranked(results)
    most = max(of["all"]["speedup_high"] or of["all"]["speedup"] for of in rows)
    scale = _BARS / max(most, 1.0)
    height = _TOP + _ROW * len(rows) + 12
    picture = Picture(_LABELS + _BARS + _VALUES, height)
    picture.text(_LABELS, 20, "Speed-up over no speculation, mean over the questions, and its 95 % interval")
    batches = sorted({result["batch"] for result in rows})
    for place, result in enumerate(rows):
        color = COLORS[batches.index(result["batch"]) % len(COLORS)]
        _row(picture, _TOP + _ROW * place, result, scale, color)
    one = _LABELS + scale
    picture.line(one, _TOP - 8, one, height - 8, stroke_dasharray="4 3")
    picture.text(one, _TOP - 10, "1x", anchor="middle")
    return str(picture)


def _row(picture: Picture, top: int, result: dict[str, Any], scale: float, color: str) -> None:
    of, middle = result["all"], top + _BAR / 2
    picture.text(_LABELS - 8, middle + 4, f"{name_of(result)}, batch {result['batch']}", anchor="end")
    picture.add("rect", x=_LABELS, y=top, width=of["speedup"] * scale, height=_BAR, fill=color)
    end = of["speedup"] * scale
    if of["speedup_low"] is not None:
        low, high = of["speedup_low"] * scale, of["speedup_high"] * scale
        picture.line(_LABELS + low, middle, _LABELS + high, middle)
        end = high
    picture.text(_LABELS + end + 6, middle + 4, f"{of['speedup']:.2f}x")
