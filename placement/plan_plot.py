"""A plan as a picture: the ranking with its intervals, and the layouts that nothing beats, by cost and by latency."""

from __future__ import annotations

from collections.abc import Sequence

from core.svg import COLORS, Picture
from placement.pareto import Point
from placement.plan import Entry, Plan

_ROW, _BAR, _TOP = 26, 16, 70
_LABELS, _BARS, _VALUES = 470, 400, 90
_PANEL, _GAP = 360, 90
"""Side of a panel, and what is left for its axis."""
_TOGETHER, _APART, _CHOSEN = COLORS[0], COLORS[1], COLORS[3]


def svg(plan: Plan) -> str:
    """The text of the file."""
    rows = [entry for entry in plan.ranking if entry.goodput_rps is not None]
    panels = _TOP + _ROW * len(rows) + 60
    picture = Picture(_LABELS + _BARS + _VALUES, panels + _PANEL + 60)
    targets = f"TTFT {plan.ttft_ms:g} ms and TPOT {plan.tpot_ms:g} ms for {plan.share:.0%}"
    picture.text(20, 22, f"{plan.model} on {plan.topology}", font_weight="bold")
    picture.text(20, 42, f"Goodput in requests/s within {targets}, and the 95 % interval over other draws")
    most = max([entry.spread.high for entry in rows if entry.spread] + [entry.goodput_rps or 0.0 for entry in rows])
    for place, entry in enumerate(rows):
        _row(picture, _TOP + _ROW * place, entry, _BARS / most, entry.name == plan.chosen.name)
    if plan.pareto:
        cost = "devices" if plan.pareto[0].dollars_per_hour is None else "dollars an hour"
        left = _Panel(picture, _GAP, panels, plan.chosen.name)
        left.draw([(p.cost, p.goodput_rps, p) for p in plan.pareto], f"Pareto front: {cost}", "goodput, requests/s")
        right = _Panel(picture, _GAP * 2 + _PANEL, panels, plan.chosen.name)
        right.draw([(p.ttft_ms, p.tpot_ms, p) for p in plan.pareto], f"TTFT in ms, for {plan.share:.0%}", "TPOT, ms")
    for number, (color, name) in enumerate([(_TOGETHER, "colocated"), (_APART, "disaggregated"), (_CHOSEN, "chosen")]):
        picture.add("rect", x=_LABELS + 130 * number, y=48, width=12, height=12, fill=color)
        picture.text(_LABELS + 130 * number + 18, 58, name)
    return str(picture)


def _row(picture: Picture, top: int, entry: Entry, scale: float, chosen: bool) -> None:
    goodput, middle = entry.goodput_rps or 0.0, top + _BAR / 2
    picture.text(_LABELS - 8, middle + 4, entry.name, anchor="end", font_size=11)
    color = _CHOSEN if chosen else _APART if entry.disaggregated else _TOGETHER
    picture.add("rect", x=_LABELS, y=top, width=goodput * scale, height=_BAR, fill=color)
    end = goodput
    if entry.spread is not None:
        picture.line(_LABELS + entry.spread.low * scale, middle, _LABELS + entry.spread.high * scale, middle)
        end = max(goodput, entry.spread.high)
    picture.text(_LABELS + end * scale + 6, middle + 4, f"{goodput:.3g}")


class _Panel:
    """A square with two axes from 0."""

    def __init__(self, picture: Picture, left: float, top: float, chosen: str) -> None:
        self._picture, self._left, self._top, self._chosen = picture, left, top, chosen

    def draw(self, places: Sequence[tuple[float, float, Point]], x_name: str, y_name: str) -> None:
        most_x = 1.05 * max(x for x, _, _ in places) or 1.0
        most_y = 1.05 * max(y for _, y, _ in places) or 1.0  # TPOT is 0 where each request gets one token
        bottom, right = self._top + _PANEL, self._left + _PANEL
        self._picture.line(self._left, bottom, right, bottom)
        self._picture.line(self._left, self._top, self._left, bottom)
        self._picture.text(self._left + _PANEL / 2, bottom + 36, x_name, anchor="middle")
        self._picture.text(self._left - 60, self._top - 10, y_name)
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            self._picture.text(self._left + _PANEL * part, bottom + 18, f"{most_x * part:.3g}", anchor="middle")
            self._picture.text(self._left - 8, bottom - _PANEL * part + 4, f"{most_y * part:.3g}", anchor="end")
        for x, y, point in places:
            at = {"cx": self._left + _PANEL * x / most_x, "cy": bottom - _PANEL * y / most_y}
            self._picture.add("circle", **at, r=5, fill=self._color(point), stroke="white")

    def _color(self, point: Point) -> str:
        if point.name == self._chosen:
            return _CHOSEN
        return _APART if point.disaggregated else _TOGETHER
