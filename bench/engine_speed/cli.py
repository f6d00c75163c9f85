"""The flags of `slipstream bench engine`, and its table. Loads torch only once the flags are understood."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from bench.flags import BadFlag
from core.errors import ConfigError
from core.finite import FiniteRange


def parse_batches(text: str) -> tuple[int, ...]:
    """ "1,4,16" -> (1, 4, 16). Raises ConfigError."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"--batch: {text!r} is not a list of batch sizes; write them with commas, such as 1,4,16")
    return tuple(dict.fromkeys(int(size) for size in text.split(",")))


def parse_prefill(text: str) -> tuple[int, int]:
    """ "16x140" -> (16, 140): prompts, and tokens of each. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"--prefill: {text!r} is not PROMPTSxTOKENS; write it such as 16x140")
    return int(found[1]), int(found[2])


@click.command("engine")
@click.option("--model", default="demo", help="As for serve.")
@click.option("--batch", default="1,4,16", help="Batch sizes of decode steps. [default: 1,4,16]")
@click.option("--context", default=170, type=click.IntRange(1), help="Mean tokens in the cache. [default: 170]")
@click.option("--prefill", default="16x140", help="Prompts x tokens of each. [default: 16x140]")
@click.option("--threads", type=click.IntRange(1), help="Cores to compute on; default: what PyTorch takes.")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bfloat16", "float16", "float32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--quantization", type=click.Choice(["int8", "fp8"]), help="As for serve.")
@click.option(
    "--perplexity-texts",
    type=click.Path(exists=True, path_type=Path),
    help="Print the perplexity of these texts, a file or a folder of them, and how quantization changes it.",
)
@click.option("--perplexity-tokens", default=8192, type=click.IntRange(1), help="At most. [default: 8192]")
@click.option("--temperature", default=1.0, type=FiniteRange(0), help="0 is greedy. [default: 1, OpenAI's own]")
@click.option("--runs", default=5, type=click.IntRange(1), help="Interleaved; medians are printed. [default: 5]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def engine(
    model: str,
    batch: str,
    prefill: str,
    runs: int,
    as_json: bool,
    perplexity_texts: Path | None,
    perplexity_tokens: int,
    **flags: Any,
) -> None:
    """Measure an engine alone: decode step times, prefill speed, where a step goes, and the roofline."""
    try:
        batches, (prompts, length) = parse_batches(batch), parse_prefill(prefill)
        from bench.engine_speed.measure import Options, measure
        from engine.checkpoints import Silent, resolve

        options = Options(batches=batches, prompts=prompts, prompt_tokens=length, runs=runs, **flags)
        folder = resolve(model, progress=Silent())
        result = {"model": model, **measure(folder, options)}
        if perplexity_texts is not None:
            from bench.engine_speed.perplexity import measure_perplexity

            load = {name: flags[name] for name in ("dtype", "device", "threads", "quantization")}
            result |= measure_perplexity(folder, perplexity_texts, perplexity_tokens, **load)
    except ConfigError as error:
        raise BadFlag(error.message) from error
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


def table(result: dict[str, Any]) -> str:
    """The JSON result for people."""
    lines = [
        "{model}, {dtype}, {device}, {threads} threads, copies at {bandwidth_gb_s:.1f} GB/s".format(**result),
        f"{'batch':>5}{'step ms':>9}{'min':>8}{'max':>8}{'roofline':>10}  share of the step",
    ]
    for batch, milliseconds in result["decode_ms"].items():
        low, high = result["decode_ms_min"][batch], result["decode_ms_max"][batch]
        shares = ", ".join(f"{part} {share:.0%}" for part, share in result["shares"][batch].items())
        roofline = result["roofline_fraction"][batch]
        lines.append(f"{batch:>5}{milliseconds:>9.2f}{low:>8.2f}{high:>8.2f}{roofline:>10.0%}  {shares}")
    low, high = result["prefill_tokens_per_s_min"], result["prefill_tokens_per_s_max"]
    speed = f"{result['prefill_tokens_per_s']:.0f} tokens/s ({low:.0f} to {high:.0f})"
    return "\n".join([*lines, f"prefill of {result['prefill']}: {speed}", *_perplexity_line(result)])


def _perplexity_line(result: dict[str, Any]) -> list[str]:
    if "perplexity" not in result:
        return []
    line = "perplexity {perplexity:.3f} over {perplexity_tokens} tokens".format(**result)
    if "perplexity_quantized" in result:
        line += ", {quantization} {perplexity_quantized:.3f} ({perplexity_change:+.2%})".format(**result)
    return [line]
