"""A replay for people: as a table, and as a picture of attainment and roles over time."""

from __future__ import annotations

from collections.abc import Callable

from core.svg import COLORS, Picture
from core.types import Role
from placement.replay import Interval, Replayed

_LEFT, _WIDTH, _TOP, _HEIGHT, _BAND = 60, 820, 70, 240, 90
_WITH, _WITHOUT = COLORS[0], COLORS[3]
_OF_ROLE = {Role.PREFILL: COLORS[1], Role.DECODE: COLORS[2], Role.BOTH: COLORS[4]}


def svg(replayed: Replayed) -> str:
    """The text of the file."""
    picture = Picture(_LEFT + _WIDTH + 30, _TOP + _HEIGHT + _BAND + 90)
    picture.text(_LEFT, 22, "Share of requests that meet both targets, by when they came", font_weight="bold")
    each = replayed.intervals[1].at_s if len(replayed.intervals) > 1 else 1.0
    end_s = replayed.intervals[-1].at_s + each
    _axes(picture, end_s)
    _line(picture, replayed, _WITHOUT, end_s, lambda interval: interval.without)
    _line(picture, replayed, _WITH, end_s, lambda interval: interval.attainment)
    for changed in replayed.changes:
        x = _LEFT + _WIDTH * changed.at_s / end_s
        picture.line(x, _TOP, x, _TOP + _HEIGHT + _BAND + 40, stroke="gray", stroke_dasharray="3 3")
    most = max(interval.arrangement.workers for interval in replayed.intervals)
    for interval in replayed.intervals:
        _workers(picture, interval, _WIDTH * each / end_s, end_s, most)
    names = [("with replanning", _WITH), ("without", _WITHOUT), *((role.value, _OF_ROLE[role]) for role in Role)]
    for number, (name, color) in enumerate(names):
        picture.add("rect", x=_LEFT + 140 * number, y=36, width=12, height=12, fill=color)
        picture.text(_LEFT + 140 * number + 18, 46, name)
    return str(picture)


def _axes(picture: Picture, end_s: float) -> None:
    for tenth in range(0, 11, 2):
        y = _TOP + _HEIGHT * (1 - tenth / 10)
        picture.line(_LEFT, y, _LEFT + _WIDTH, y, stroke="lightgray")
        picture.text(_LEFT - 8, y + 4, f"{10 * tenth} %", anchor="end")
    for part in range(7):
        x = _LEFT + _WIDTH * part / 6
        picture.text(x, _TOP + _HEIGHT + _BAND + 60, f"{end_s * part / 6:.0f} s", anchor="middle")


def _line(
    picture: Picture, replayed: Replayed, color: str, end_s: float, share: Callable[[Interval], float | None]
) -> None:
    known = [(interval.at_s, share(interval)) for interval in replayed.intervals]
    places = [
        f"{_LEFT + _WIDTH * at_s / end_s:.1f},{_TOP + _HEIGHT * (1 - met):.1f}"
        for at_s, met in known
        if met is not None
    ]
    picture.add("polyline", points=" ".join(places), fill="none", stroke=color, stroke_width=2)


def _workers(picture: Picture, interval: Interval, width: float, end_s: float, most: int) -> None:
    """One above the other, by role."""
    bottom = float(_TOP + _HEIGHT + _BAND + 40)
    for role in Role:
        height = _BAND * interval.arrangement.of(role) / most
        bottom -= height
        x = _LEFT + _WIDTH * interval.at_s / end_s
        picture.add("rect", x=x, y=bottom, width=width, height=height, fill=_OF_ROLE[role])


def table(replayed: Replayed) -> str:
    """For a terminal: every change with its reasons, and how it went."""
    start, changes = replayed.start, replayed.changes
    lines = [f"{replayed.requests} requests at {replayed.rate_rps:.3g}/s; at the start {start}", ""]
    lines += [f"at {one.at_s:.0f} s {one.change.by}: {one.change.to}\n    {one.change.why}" for one in changes]
    lines += ["nothing would have been changed"] if not changes else [""]
    lines += [f"{'s':>7}{'requests':>10}{'attained':>10}{'without':>10}  used as"]
    lines += [
        f"{interval.at_s:>7.0f}{interval.requests:>10}{_percent(interval.attainment):>10}{_percent(interval.without):>10}"
        f"  {interval.arrangement}"
        for interval in replayed.intervals
    ]
    with_it, without = _percent(replayed.attainment), _percent(replayed.without)
    lines += ["", f"{with_it} attained with {replayed.workers:.3g} workers on average, {without} without"]
    if replayed.left_out:
        lines.append(f"warning: {replayed.left_out} more requests are left out: no worker can hold them")
    lines += [f"warning: {warning}" for warning in replayed.warnings]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
