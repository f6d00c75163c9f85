"""The flags of `slipstream bench transfer`, and its tables. Loads torch only once the flags are understood."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import click

from bench.flags import BadFlag, check_meant
from bench.transfer.links import check_hosts, parse_links
from core.errors import ConfigError
from core.finite import FiniteRange
from kv_transfer.codecs.names import CodecName

MAX_MIB = 1024
SIZES = "1,8,11.25,32,128"
"""11.25 MiB are 512 tokens of the demo model."""
_OF_SERVERS = ("model", "prompt_tokens", "num_requests", "servers")
_OF_SPEED = ("sizes", "rounds", "link", "delay_ms", *_OF_SERVERS[1:])
_OF_QUALITY = ("dataset_path", "num_prompts", "max_tokens", "codecs", "threads", "dtype", "device")


def parse_codecs(text: str) -> tuple[CodecName, ...]:
    """ "fp8,int8" -> ("fp8", "int8"). Raises ConfigError."""
    known: dict[str, CodecName] = {name: name for name in get_args(CodecName)}
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"--codecs: {name!r} is no codec; write some of {','.join(known)}")
    return tuple(known[name] for name in names)


def parse_sizes(text: str) -> list[float]:
    """ "1,11.25" -> [1.0, 11.25]. Raises ConfigError."""
    parts = text.split(",")
    sizes = [float(part) if re.fullmatch(r"\d{1,4}(\.\d{1,2})?", part, re.ASCII) else 0.0 for part in parts]
    if not all(0 < size <= MAX_MIB for size in sizes):
        raise ConfigError(f"--sizes: {text!r} is no list of MiB; write something like 1,8,32, up to {MAX_MIB}")
    return sizes


@click.command("transfer")
@click.option("--quality", is_flag=True, help="Measure what the codecs cost in quality, instead of speed.")
@click.option("--model", default="demo", help="As for serve.")
@click.option("--sizes", default=SIZES, help=f"Of transfers, in MiB. [default: {SIZES}]")
@click.option("--rounds", default=7, type=click.IntRange(3), help="Of each transfer. [default: 7]")
@click.option("--link", help="Between two hosts, network namespaces, with links like 1gbit,10gbit; needs root.")
@click.option("--delay-ms", default=0.0, type=FiniteRange(0, 1000), help="Of such a link, in each direction.")
@click.option("--prompt-tokens", default=512, type=click.IntRange(16), help="Of requests to servers. [default: 512]")
@click.option("--num-requests", default=15, type=click.IntRange(3), help="To each server, each time. [default: 15]")
@click.option("--servers", default=2, type=click.IntRange(0), help="Times two servers are started; 0: none.")
@click.option("--dataset-path", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="JSONL with turns.")
@click.option("--num-prompts", default=60, type=click.IntRange(1), help="Spread over the file. [default: 60]")
@click.option("--max-tokens", default=64, type=click.IntRange(2), help="Of each output, at most. [default: 64]")
@click.option("--codecs", default=",".join(get_args(CodecName)), help="[default: all of them]")
@click.option("--threads", type=click.IntRange(1), help="Cores the model computes on; default: what PyTorch takes.")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "bfloat16", "float16", "float32"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def transfer(ctx: click.Context, /, quality: bool, model: str, as_json: bool, **flags: Any) -> None:
    """Measure the hand-over of KV.

    Speed: transfers of every transport beside the bare loops of what they are made of, how much a prefill hides of
    them, and what a hand-off adds to the time to first token and the gap after it. With --link: transports alone and
    bare loops between two hosts. With --quality: how much smaller, slower and wronger each codec is.
    """
    try:
        check_meant(ctx, _OF_SPEED if quality else _OF_QUALITY, f"{'with' if quality else 'without'} --quality")
        _check_link(ctx, flags["link"])
        result = _quality(model, **flags) if quality else _speed(model, **flags)
    except ConfigError as error:
        raise BadFlag(error.message) from error
    show = table if quality else link_table if flags["link"] else speed_table
    click.echo(json.dumps(result, indent=2) if as_json else show(result))


def _check_link(ctx: click.Context, link: str | None) -> None:
    """Raises ConfigError for flags that have no meaning with or without --link."""
    check_meant(ctx, ("delay_ms",) if link is None else _OF_SERVERS, f"{'without' if link is None else 'with'} --link")


def _quality(
    model: str, *, dataset_path: Path | None, num_prompts: int, max_tokens: int, codecs: str, **flags: Any
) -> dict[str, Any]:
    if dataset_path is None:
        raise ConfigError("--dataset-path: --quality needs prompts; give a JSONL file with turns")
    names = parse_codecs(codecs)
    from bench.transfer.quality import measure_quality
    from engine.checkpoints import Silent, resolve

    load = {name: flags[name] for name in ("threads", "dtype", "device")}
    folder = resolve(model, progress=Silent())
    return {"model": model, **measure_quality(folder, dataset_path, num_prompts, max_tokens, names, **load)}


def _speed(
    model: str,
    *,
    sizes: str,
    rounds: int,
    link: str | None,
    delay_ms: float,
    prompt_tokens: int,
    num_requests: int,
    servers: int,
    **_: Any,
) -> dict[str, Any]:
    mib = parse_sizes(sizes)
    if link is not None:
        links = parse_links(link, delay_ms)
        check_hosts(delay_ms)
        from bench.transfer.over_link import measure_links

        return measure_links(links, mib, rounds)
    from bench.transfer.gap import measure_gap
    from bench.transfer.rates import measure_rates

    result = measure_rates(mib, rounds)
    if servers:
        result["gap"] = measure_gap(model, prompt_tokens, num_requests, servers)
    return result


def speed_table(result: dict[str, Any]) -> str:
    """The JSON result of the speed for people."""
    heads = f"{'of bare':>9}{'same size':>11}{'hidden':>8}{'alone':>9}{'of bare':>9}{'same size':>11}{'unsummed':>10}"
    lines = [f"{'transport':<18}{'MiB':>5}{'ms':>9}{'GB/s':>7}{heads}"]
    for transport, found in result["transports"].items():
        for mib, one in found.items():
            alone, unsummed = one["alone"]["checksum"], one["alone"]["no_checksum"]
            lines.append(
                f"{transport:<18}{mib:>5}{one['ms']:>9.2f}{one['bytes_per_s'] / 1e9:>7.2f}"
                f"{one['share']:>9.0%}{one['share_same_size']:>11.0%}{one['hidden']:>8.0%}"
                f"{alone['bytes_per_s'] / 1e9:>9.2f}{alone['share']:>9.0%}{alone['share_same_size']:>11.0%}"
                f"{unsummed['share_same_size']:>10.0%}"
            )
    if (gap := result.get("gap")) is not None:
        extra, ttft = (_added(gap, name) for name in ("first_gap_extra", "ttft"))
        lines.append(
            f"{gap['prompt_tokens']} tokens: a hand-off adds {extra} to the gap after the first token and {ttft} to "
            f"the time to it (median of the starts of the servers, least to most)"
        )
    return "\n".join(lines)


def _added(gap: dict[str, Any], name: str) -> str:
    of_starts = gap[f"{name}_added_by_start_ms"]
    return f"{gap[f'{name}_added_ms']:+.1f} ms ({min(of_starts):+.1f} to {max(of_starts):+.1f})"


def link_table(result: dict[str, Any]) -> str:
    """The JSON result of links for people. `of bare`: of the bare loop over as many bytes and the same link."""
    lines = [
        f"{'link':<10}{'delay':>8}  {'transport':<18}{'MiB':>6}{'ms':>9}{'Gbit/s':>9}{'of bare':>9}{'one by one':>12}"
    ]
    for name, link in result["links"].items():
        for transport, found in link["transports"].items():
            for mib, one in found.items():
                rate = one["in_flight"]
                lines.append(
                    f"{name:<10}{link['delay_ms']:>5g} ms  {transport:<18}{mib:>6}{rate['ms']:>9.2f}"
                    f"{8 * rate['bytes_per_s'] / 1e9:>9.2f}{rate['share']:>9.0%}{one['one_at_a_time']['share']:>12.0%}"
                )
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """The JSON result for people."""
    lines = [
        "{model}, {dtype}, {device}, {prompts} prompts, {positions} positions".format(**result),
        f"{'codec':<6}{'smaller':>9}{'encode':>11}{'decode':>11}{'KL, nats':>11}{'same choice':>13}{'unchanged':>11}",
    ]
    for name, cost in result["codecs"].items():
        speeds = f"{cost['encode_gb_s']:>6.2f} GB/s{cost['decode_gb_s']:>6.2f} GB/s"
        shares = f"{cost['same_choice']:>13.2%}{cost['unchanged_tokens']:>11.2%}"
        lines.append(f"{name:<6}{cost['ratio']:>8.2f}x{speeds}{cost['kl']:>11.5f}{shares}")
    return "\n".join(lines)
