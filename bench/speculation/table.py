"""The JSON result for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from bench.speculation.goals import missed

_PIPE_WIDTH = 160


def show(table: Group) -> None:
    """On stdout, not cut to 80 columns where that is no terminal."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, markup=False, highlight=False).print(table)


def name_of(result: dict[str, Any]) -> str:
    return f"{'+'.join(result['drafters'])}, {result['rule']}, {result['controller']}"


def line(result: dict[str, Any]) -> str:
    """One result."""
    return f"{name_of(result)}, batch {result['batch']}: {_times(result['all'], 'speedup')} {_interval(result['all'])}"


def ranked(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By batch size, the fastest first."""
    return sorted(results, key=lambda result: (result["batch"], -result["all"]["speedup"]))


def leaderboard(result: dict[str, Any]) -> Group:
    """All results over all questions, then each task's speed-ups, then what went wrong."""
    results = ranked(result["results"])
    title = "{model}, {dtype}, {device}, {threads} threads; budget {budget}, temperature {temperature:g}".format(
        **result
    )
    lines = [text for one in results for text in _troubles(one)]
    return Group(title, _overall(results), _tasks(results), *lines)


def step_table(result: dict[str, Any]) -> Group:
    """Milliseconds of a step: a line for each number of rows."""
    columns = [(batch, shape) for batch, shapes in result["step_ms"].items() for shape in shapes]
    title = "{model}, {dtype}, {device}, {threads} threads, {context} tokens in the cache; ms of a step".format(
        **result
    )
    table = Table()
    table.add_column("rows", justify="right")
    for batch, shape in columns:
        table.add_column(f"{batch} x {shape}", justify="right")
    times = [result["step_ms"][batch][shape] for batch, shape in columns]
    for rows in times[0]:
        table.add_row(str(rows), *(f"{of[rows]:.2f}" for of in times))
    table.add_section()
    table.add_row("free", *(str(result["free_rows"][batch][shape]) for batch, shape in columns))
    return Group(title, table, "free: the most rows with which a step takes at most a tenth longer than with one")


def _overall(results: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for column in ("batch", "drafter, rule, controller"):
        table.add_column(column, no_wrap=True)
    for column in (
        "speed-up",
        "95 %",
        "geometric",
        "decoding",
        "tau",
        "alpha",
        "tokens/s",
        "without",
        "drafting",
        "verifying",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        of = result["all"]
        table.add_row(
            str(result["batch"]),
            name_of(result),
            _times(of, "speedup"),
            _interval(of),
            _times(of, "geometric_speedup"),
            _times(of, "decode_speedup"),
            _number(of["tau"], ".2f"),
            _number(of["alpha"], ".2f"),
            f"{of['tokens_per_s']:.1f}",
            f"{of['plain_tokens_per_s']:.1f}",
            _number(of["draft_share"], ".1%"),
            _number(of["verify_share"], ".1%"),
        )
    return table


def _tasks(results: Sequence[dict[str, Any]]) -> Table:
    tasks = sorted({task for result in results for task in result["tasks"]})
    table = Table(title="speed-up by task", title_justify="left")
    for column in ("batch", "drafter, rule, controller"):
        table.add_column(column, no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right")
    for result in results:
        found = (result["tasks"].get(task) for task in tasks)
        table.add_row(
            str(result["batch"]), name_of(result), *("-" if of is None else _times(of, "speedup") for of in found)
        )
    return table


def _troubles(result: dict[str, Any]) -> list[str]:
    where = f"{name_of(result)}, batch {result['batch']}"
    lines = [f"{where}: {drafter} was switched off: {reason}" for drafter, reason in result["switched_off"].items()]
    lines += [f"{where}: {goal}" for goal in missed(result)]
    if found := result["divergences"]:
        first = found[0]
        lines.append(
            f"{where}: {len(found)} of {result['all']['questions']} answers are others than without, "
            f"{sum(not one['excused'] for one in found)} of them not by rounding; question {first['question_id']} from "
            f"token {first['position']} on, where what was said is {first['margin']:.2g} from the best"
        )
    return lines


def _times(summary: dict[str, Any], key: str) -> str:
    return _number(summary[key], ".2f", "x")


def _interval(summary: dict[str, Any]) -> str:
    low, high = summary["speedup_low"], summary["speedup_high"]
    return "-" if low is None else f"{low:.2f} to {high:.2f}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
