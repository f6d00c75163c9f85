"""The flags of `slipstream bench speculation`. Loads torch only once the flags are understood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.engine_speed.cli import parse_batches
from bench.flags import BadFlag, check_meant, check_plot
from core.errors import ConfigError
from core.files import write_text
from core.finite import FiniteRange
from speculation.controllers.registry import DEFAULT_CONTROLLER
from speculation.rules.registry import DEFAULT_RULE

_OF_ANSWERS = (
    "dataset",
    "drafters",
    "rules",
    "controllers",
    "weights",
    "budget",
    "speculation_memory",
    "num_prompts",
    "max_tokens",
    "temperature",
    "ignore_eos",
    "plot",
    "strict",
)
_OF_STEPS = ("context", "runs")


@click.command("speculation")
@click.option("--step-times", is_flag=True, help="Time steps that verify 1 to 80 rows a request, instead of answers.")
@click.option("--model", default="demo", help="As for serve.")
@click.option("--dataset", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSONL with turns.")
@click.option("--drafters", help="With commas between; with + for bandit to choose. [default: all without weights]")
@click.option("--weights", multiple=True, help="NAME=FOLDER, of a drafter that takes some; may be repeated.")
@click.option("--rules", default=DEFAULT_RULE, show_default=True, help="Verify rules, with commas between.")
@click.option("--controllers", default=DEFAULT_CONTROLLER, show_default=True, help="With commas between.")
@click.option("--budget", type=click.IntRange(1), help="Draft tokens of a request in a step; default: as for serve.")
@click.option("--speculation-memory", help="That drafters may hold together; default: as for serve.")
@click.option("--batch", default="1,4,16", help="Questions at a time. [default: 1,4,16]")
@click.option("--num-prompts", default=80, type=click.IntRange(1), help="Spread over the file. [default: 80]")
@click.option("--max-tokens", default=1024, type=click.IntRange(2), help="Of an answer; default: 1024, as Spec-Bench.")
@click.option("--temperature", default=0.0, type=FiniteRange(0), help="[default: 0, greedy]")
@click.option("--ignore-eos", is_flag=True, help="Answers have all of --max-tokens, with and without drafts.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the speed-ups to this .svg file.")
@click.option(
    "--strict", is_flag=True, help="Exit status 1 also if drafting takes too much, or a controller lets it cost."
)
@click.option("--context", default=256, type=click.IntRange(1), help="In the cache, of --step-times. [default: 256]")
@click.option("--runs", default=7, type=click.IntRange(1), help="Of each step of --step-times. [default: 7]")
@click.option("--threads", type=click.IntRange(1), help="Cores to compute on; default: what PyTorch takes.")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bfloat16", "float16", "float32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def speculation(
    ctx: click.Context, /, step_times: bool, model: str, batch: str, strict: bool, as_json: bool, **flags: Any
) -> None:
    """Measure what speculation gains on one engine: each answer beside one without it.

    Exit status 1 if a greedy answer is another one where rounding doesn't explain it. With --strict also if drafting
    takes more than 15 % of the time of steps, or if the lower end of a speed-up is below 0.97 but for controller fixed.
    """
    try:
        unused, how = (_OF_ANSWERS, "with") if step_times else (_OF_STEPS, "without")
        check_meant(ctx, unused, f"{how} --step-times")
        run = _steps if step_times else _answers
        result = run(model, parse_batches(batch), **flags)
    except ConfigError as error:
        raise BadFlag(error.message) from error
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        from bench.speculation.table import leaderboard, show, step_table

        show(step_table(result) if step_times else leaderboard(result))
    results = result.get("results", ())
    if any(not found["excused"] for one in results for found in one["divergences"]):
        ctx.exit(1)
    if strict and any(not goal["met"] for one in results for goal in one["goals"].values()):
        ctx.exit(1)


def _steps(model: str, batches: tuple[int, ...], *, context: int, runs: int, **flags: Any) -> dict[str, Any]:
    from bench.speculation.step_times import Options, measure_steps
    from engine.checkpoints import Silent, resolve

    load = {name: flags[name] for name in ("threads", "dtype", "device")}
    options = Options(batches=batches, context=context, runs=runs, **load)
    return {"model": model, **measure_steps(resolve(model, progress=Silent()), options)}


def _answers(
    model: str,
    batches: tuple[int, ...],
    *,
    drafters: str | None,
    rules: str,
    controllers: str,
    budget: int | None,
    speculation_memory: str | None,
    weights: Sequence[str],
    plot: Path | None,
    dataset: Path | None,
    **flags: Any,
) -> dict[str, Any]:
    if dataset is None:
        raise ConfigError("--dataset: there is nothing to ask; give a JSONL file with turns")
    check_plot(plot)
    from bench.speculation.entries import USELESS, parse_entries
    from speculation.drafters.registry import registered

    with registered(USELESS):
        entries = parse_entries(drafters, rules, controllers, budget, weights, speculation_memory)
        from bench.speculation.measure import Options, measure
        from bench.speculation.table import line
        from engine.checkpoints import Silent, resolve

        asked = ("num_prompts", "max_tokens", "temperature", "ignore_eos", "threads", "dtype", "device")
        options = Options(dataset=dataset, entries=entries, batches=batches, **{name: flags[name] for name in asked})
        folder = resolve(model, progress=Silent())
        result = {"model": model, **measure(folder, options, lambda one: click.echo(line(one), err=True))}
    if plot is not None:
        from bench.speculation.plot import svg

        write_text(plot, svg(result["results"]), "plot")
    return result
