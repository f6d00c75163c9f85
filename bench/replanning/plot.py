"""Attainment over time as a picture: a line for each run, and marks for the shift and for what was changed."""

from __future__ import annotations

from collections.abc import Callable

from bench.replanning.report import Report, Verdict
from core.svg import COLORS, Picture

Scale = Callable[[float], float]
"""From a value to pixels."""

_WIDTH, _HEIGHT = 720, 260
_LEFT, _TOP, _RIGHT, _BOTTOM = 60, 44, 150, 40
"""Pixels of the frame, and of the margins around it."""


def svg(report: Report) -> str:
    """The text of the file."""
    picture = Picture(_LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM)
    seconds = max(point.at_s for verdict in report.verdicts for point in verdict.curve)

    def x(at_s: float) -> float:
        return _LEFT + _WIDTH * max(0.0, at_s) / seconds

    def y(attained: float) -> float:
        return _TOP + _HEIGHT * (1 - attained)

    title = f"Requests within ttft {report.targets.ttft_ms:g} ms and tpot {report.targets.tpot_ms:g} ms, by when due"
    picture.text(_LEFT, 20, title)
    for tenth in range(0, 11, 2):
        picture.line(_LEFT, y(tenth / 10), _LEFT + _WIDTH, y(tenth / 10), stroke="#dddddd")
        picture.text(_LEFT - 8, y(tenth / 10) + 4, f"{tenth * 10} %", anchor="end")
    picture.line(_LEFT, y(report.share), _LEFT + _WIDTH, y(report.share), stroke_dasharray="4 3")
    picture.line(x(report.shift_s), _TOP - 8, x(report.shift_s), _TOP + _HEIGHT, stroke_dasharray="4 3")
    picture.text(x(report.shift_s), _TOP - 12, f"shift, {report.shift_s:g} s", anchor="middle")
    picture.text(_LEFT + _WIDTH, _TOP + _HEIGHT + 30, f"{seconds:g} s", anchor="end")
    names = {False: "as it was", True: "replanned"}
    for place, replanned in enumerate(sorted({verdict.replanned for verdict in report.verdicts})):
        picture.text(_LEFT + _WIDTH + 12, _TOP + 16 + 18 * place, names[replanned], fill=_color(replanned))
    for verdict, run in zip(report.verdicts, report.runs, strict=True):
        _curve(picture, verdict, x, y)
        for change, done in zip(run.changes, run.done, strict=True):
            until = seconds if done is None else done
            picture.line(x(change.at_s), _TOP + _HEIGHT + 4, x(until), _TOP + _HEIGHT + 4, stroke=_color(True))
            picture.line(x(change.at_s), _TOP + _HEIGHT, x(change.at_s), _TOP + _HEIGHT + 8, stroke=_color(True))
            picture.text(x(change.at_s), _TOP + _HEIGHT + 20, change.to.split(",")[0], anchor="middle")
    return str(picture)


def _curve(picture: Picture, verdict: Verdict, x: Scale, y: Scale) -> None:
    points = [(x(point.at_s), y(point.attainment)) for point in verdict.curve if point.attainment is not None]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
    picture.add("polyline", points=path, fill="none", stroke=_color(verdict.replanned), stroke_width=2)


def _color(replanned: bool) -> str:
    return COLORS[0] if replanned else COLORS[3]
