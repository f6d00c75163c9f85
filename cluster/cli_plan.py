"""`slipstream plan`: which layout serves a workload best, on devices that are here or only in a file."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import msgspec

from cluster.machine import cpu_name, usable_cores
from core.errors import ConfigError
from placement.latency import Speculation
from placement.profile import Profile, read_profile
from placement.shapes import Limits
from placement.topology import Topology, read_topology
from placement.traces import read_trace
from placement.workload import Workload

_path = click.Path(path_type=Path)
_positive = click.FloatRange(min=0, min_open=True)
_WAYS = (1, 2, 4, 8)
"""Tensor parallel sizes of which a roofline is made."""


def parse_sizes(_: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdigit() and 1 <= int(size) <= 2**20 for size in sizes):
        raise ConfigError(f"--{(option.name or '').replace('_', '-')}: {text!r} is not a list of sizes, such as 1,2,4")
    return tuple(dict.fromkeys(int(size) for size in sizes))


@click.command()
@click.argument("model", default="demo")
@click.option("--slo", required=True, help="Targets in ms, as ttft=200,tpot=50.")
@click.option("--share", default=0.9, type=click.FloatRange(0, 1, min_open=True, max_open=True), show_default=True)
@click.option("--profile", "profiles", type=_path, multiple=True, help="Of slipstream profile; one for each shape.")
@click.option("--device", "kind", help="Instead of profile and topology: nodes of such devices, by a table.")
@click.option("--topology", "topology_file", type=_path, help="A YAML file. Default: this machine.")
@click.option("--devices", type=click.IntRange(1), help="No more than so many.")
@click.option("--trace", type=_path, help="Requests: a .csv as Azure's, or a .jsonl as Mooncake's.")
@click.option("--lengths", help="Instead of a trace: mean tokens, as prompt=512,output=128,cv=0.8.")
@click.option("--rate", type=_positive, help="Requests/s to serve as cheaply as can be. Default: the most per device.")
@click.option("--objective", default="per-device", type=click.Choice(["per-device", "per-dollar", "total"]))
@click.option("--chunk-tokens", default="512,2048", show_default=True, callback=parse_sizes, help="Of a step, to try.")
@click.option("--pipeline-parallel-size", default="1", show_default=True, callback=parse_sizes, help="To try.")
@click.option("--max-num-seqs", default=64, type=click.IntRange(1, 4096), show_default=True, help="As for serve.")
@click.option("--kv-cache-memory", help="As for serve. Default: 1GiB on a CPU; what weights leave of a GPU.")
@click.option("--handoff-min-tokens", default=0, type=click.IntRange(0), show_default=True, help="As for serve.")
@click.option("--overhead-ms", default=0.0, type=click.FloatRange(0), help="Of a request outside of the workers.")
@click.option("--speculation", "drafter", help="Try layouts with this drafter too.")
@click.option("--acceptance-length", type=click.FloatRange(1), help="Tokens of a step with drafts, on average.")
@click.option("--draft-tokens", default=4, type=click.IntRange(1), show_default=True, help="That a step verifies.")
@click.option("--draft-ms", default=0.0, type=click.FloatRange(0), help="Of a step's drafting.")
@click.option("--learner-devices", default=0, type=click.IntRange(0), help="Kept free for the learner.")
@click.option("--out", type=_path, help="Write the configuration for slipstream serve --config.")
@click.option("--json/--table", "as_json", default=False, help="How it is printed. [default: table]")
def plan(
    model: str,
    slo: str,
    share: float,
    profiles: tuple[Path, ...],
    kind: str | None,
    topology_file: Path | None,
    devices: int | None,
    rate: float | None,
    objective: Any,
    out: Path | None,
    as_json: bool,
    trace: Path | None,
    lengths: str | None,
    drafter: str | None,
    **given: Any,
) -> None:
    """Find the layout that serves MODEL best within its targets, and say what it will reach."""
    from cluster.planned import config_of, why_not, write_config
    from placement.goodput import Goal
    from placement.plan import make_plan
    from placement.plan_table import table
    from placement.shapes import shapes, space_of
    from placement.slo import parse_slo

    goal, workload = Goal(parse_slo(slo), share), _workload(trace, lengths)
    topology = _topology(kind, topology_file, devices, profiles)
    limits = _limits(topology, devices=devices, drafter=drafter, **given)
    known = _profiles(model, profiles, topology)
    ways = shapes(known, limits)
    made = make_plan(partial(space_of, topology, ways, limits), ways, topology, workload, goal, objective, rate)
    if kind is None and topology_file is None:
        made.plan.warnings += [warning for profile in known for warning in measured_elsewhere(profile)]
    by_name, chosen = {shape.name: shape for shape in ways}, made.candidates[0]
    able = next((candidate for candidate in made.candidates if why_not(candidate, by_name) is None), None)
    if able is not None:
        made.plan.serve = config_of(able, by_name, limits, drafter)
    if able is not chosen:
        instead = "" if able is None else f"; serve gets {able.name}"
        made.plan.warnings.append(f"{why_not(chosen, by_name)}{instead}")
    if out is not None:
        if made.plan.serve is None:
            raise ConfigError(f"--out: {why_not(chosen, by_name)}; give one --profile", param="out")
        write_config(made.plan.serve, out)
    click.echo(msgspec.json.format(msgspec.json.encode(made.plan)).decode() if as_json else table(made.plan))


def measured_elsewhere(profile: Profile) -> list[str]:
    """How this machine and its software differ from those of a profile, a sentence each."""
    if profile.source != "measured":
        return []
    here = {name: version(name) for name in ("slipstream", "torch")}
    if profile.setting.device == "cpu":
        here |= {"device": cpu_name(), "cores": str(usable_cores())}
    known = profile.setting.versions | profile.setting.hardware
    return [
        f"profiled with {name} {known[name]}, and here it is {value}: profile again"
        for name, value in here.items()
        if name in known and str(known[name]) != value
    ]


def _workload(trace: Path | None, lengths: str | None) -> Workload:
    if (trace is None) == (lengths is None):
        raise ConfigError("give a --trace, or --lengths such as prompt=512,output=128", param="trace")
    if trace is not None:
        return read_trace(trace).workload
    from placement.lengths import parse_lengths

    return parse_lengths(lengths or "")


def _topology(kind: str | None, file: Path | None, devices: int | None, profiles: tuple[Path, ...]) -> Topology:
    if kind is not None:
        if file is not None or profiles:
            raise ConfigError("--device stands for a profile and a topology: give it, or them", param="device")
        if devices is None:
            raise ConfigError("--device: give --devices too, how many there are", param="devices")
        from placement.topology import of_device

        return of_device(kind, devices)
    if file is not None:
        return read_topology(file)
    from cluster.hardware import topology_here

    return topology_here()


def _limits(
    topology: Topology,
    *,
    devices: int | None,
    chunk_tokens: tuple[int, ...],
    pipeline_parallel_size: tuple[int, ...],
    max_num_seqs: int,
    kv_cache_memory: str | None,
    handoff_min_tokens: int,
    overhead_ms: float,
    drafter: str | None,
    acceptance_length: float | None,
    draft_tokens: int,
    draft_ms: float,
    learner_devices: int,
) -> Limits:
    if (drafter is None) != (acceptance_length is None):
        raise ConfigError("--speculation and --acceptance-length go together: give both", param="speculation")
    from cluster.config import load
    from engine.kv_layout import DEFAULT_KV_CACHE_BYTES

    settings = {"kv_cache_memory": kv_cache_memory, "speculation": drafter}
    kv_cache_bytes = load(None, {name: value for name, value in settings.items() if value}).engine.kv_cache_bytes
    if kv_cache_bytes is None and "cpu" in topology.pools:
        kv_cache_bytes = DEFAULT_KV_CACHE_BYTES
    speculation = None
    if acceptance_length is not None:
        speculation = Speculation(acceptance_length, 1 + draft_tokens, draft_ms)
    return Limits(
        stages=pipeline_parallel_size,
        chunk_tokens=chunk_tokens,
        max_sequences=max_num_seqs,
        kv_cache_bytes=kv_cache_bytes,
        handoff_min_tokens=handoff_min_tokens,
        overhead_ms=overhead_ms,
        speculation=speculation,
        learner_devices={next(iter(topology.pools)): learner_devices} if learner_devices else {},
        devices=devices,
    )


def _profiles(model: str, files: tuple[Path, ...], topology: Topology) -> list[Profile]:
    """Those of the files, and rooflines for the devices of the topology that have none."""
    measured = [read_profile(path) for path in files]
    for profile in measured:
        if profile.model.name != model:
            raise ConfigError(f"--profile: it is of {profile.model.name}, not of {model}", param="profile")
        for name in ("fingerprint", "dtype", "quantization"):
            ours, theirs = getattr(measured[0].model, name), getattr(profile.model, name)
            if ours != theirs:
                raise ConfigError(f"--profile: two differ in {name}: {ours} and {theirs}", param="profile")
    missing = [kind for kind in topology.pools if kind not in {profile.setting.device for profile in measured}]
    return measured + [found for kind in missing for found in _rooflines(model, kind, topology)]


def _rooflines(model: str, kind: str, topology: Topology) -> list[Profile]:
    """One for each way to split the model over devices of a node."""
    from cluster.model_size import roofline_of

    inside = topology.inside()
    link = inside.gb_per_s if inside else None
    found = [roofline_of(model, kind, 1, link)]
    for tp in _WAYS[1:]:
        if tp > topology.most_in_a_node(kind):
            break
        try:
            found.append(roofline_of(model, kind, tp, link))
        except ConfigError:
            continue  # heads that can't be shared out over so many
    return found
