"""What a result is held to: speculation that its controller may leave is never dearer than none, and drafting is never
much of a step."""

from __future__ import annotations

from typing import Any

FORCED = ("fixed",)
"""Controllers that go on whatever it costs."""
LEAST_SPEEDUP = 0.97
"""Of the lower end of its interval: two engines that do the same differ by no more."""
MOST_DRAFTING = 0.15
"""Of the time of steps."""


def goals(controller: str, overall: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By the key of `overall` (report.summary) that is held to it: {"goal": number, "met": whether}. What was not
    observed is held to nothing."""
    found = {}
    if (speedup := overall["speedup_low"]) is not None and controller not in FORCED:
        found["speedup_low"] = {"goal": LEAST_SPEEDUP, "met": speedup >= LEAST_SPEEDUP}
    if (drafting := overall["draft_share"]) is not None:
        found["draft_share"] = {"goal": MOST_DRAFTING, "met": drafting <= MOST_DRAFTING}
    return found


def missed(result: dict[str, Any]) -> list[str]:
    """A line for each goal that one of the command's `results` misses."""
    overall = result["all"]
    return [
        f"{key} is {overall[key]:.3f}, beyond {goal['goal']:g}"
        for key, goal in result["goals"].items()
        if not goal["met"]
    ]
