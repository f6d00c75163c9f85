"""The flags of `slipstream bench gpu`, and its table."""

from __future__ import annotations

import json
from typing import Any

import click

from bench.engine_speed.cli import parse_batches
from bench.gpu_speed.shapes import SHAPES
from core.errors import ConfigError
from core.finite import FiniteRange
from engine.cuda.choice import KERNELS


@click.command("gpu")
@click.option(
    "--shape", default="llama-3-8b", type=click.Choice(list(SHAPES)), help="Of the model, whose weights are random."
)
@click.option("--batch", default="1,64", help="Batch sizes of decode steps. [default: 1,64]")
@click.option("--context", default=1024, type=click.IntRange(1), help="Tokens in the cache. [default: 1024]")
@click.option("--prefill", default=8192, type=click.IntRange(1), help="Tokens of the prompt. [default: 8192]")
@click.option("--step-tokens", default=8192, type=click.IntRange(1), help="Of the prompt in one step. [default: 8192]")
@click.option("--attention", default="auto", type=click.Choice(["auto", *KERNELS]), help="Kernel. [default: auto]")
@click.option(
    "--enforce-eager", is_flag=True, help="No captured graphs; with --attention auto, PyTorch's operators only."
)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bfloat16", "float16", "float32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--temperature", default=1.0, type=FiniteRange(0), help="0 is greedy. [default: 1, OpenAI's own]")
@click.option("--runs", default=5, type=click.IntRange(1), help="Interleaved; medians are printed. [default: 5]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gpu(batch: str, as_json: bool, **flags: Any) -> None:
    """Measure decode and prefill of a model's shape against what the device can do."""
    try:
        batches = parse_batches(batch)
        from bench.gpu_speed.measure import Options, measure

        result = measure(Options(batches=batches, **flags))
    except ConfigError as error:
        raise click.UsageError(error.message) from error
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


def table(result: dict[str, Any]) -> str:
    """The JSON result for people."""
    captured = "captured" if result["captured"] else "eager"
    lines = [
        "{shape}, {dtype}, {device}, attention by {attention}, decode steps {0}".format(captured, **result),
        "copies at {bandwidth_gb_s:.0f} GB/s, products at {matmul_tflop_s:.1f} TFLOP/s".format(**result),
        f"{'':<12}{'ms':>9}{'roofline':>10}{'goal':>7}",
    ]
    times = {f"decode {size}": ms for size, ms in result["decode_ms"].items()} | {"prefill": result["prefill_ms"]}
    for name, milliseconds in times.items():
        goal = result["goals"].get(name)
        verdict = f"{goal['goal']:>7.0%}  {'met' if goal['met'] else 'missed'}" if goal else ""
        lines.append(f"{name:<12}{milliseconds:>9.2f}{result['roofline_fraction'][name]:>10.1%}{verdict}")
    speed = "prefill of {prefill} tokens at {prefill_tokens_per_s:.0f} tokens/s; decode after {context}".format(
        **result
    )
    return "\n".join([*lines, speed])
