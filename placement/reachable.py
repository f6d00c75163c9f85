"""Which arrangements a cluster can be brought into, and what changing to one costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from core.types import Role
from placement.arrangement import Arrangement
from placement.load import Load
from placement.moving import Way
from placement.worker_shape import WorkerShape, devices_of

AS_STARTED: tuple[None] = (None,)
"""The shapes to choose from where these don't change."""


def arrangements(
    devices: int, least: int, sizes: Sequence[int], shapes: Sequence[WorkerShape | None] = AS_STARTED
) -> Iterator[Arrangement]:
    """On so many devices, as many as workers of these shapes can use: all do both, or every split with at least `least`
    in each role, with steps of any of the sizes. Some of each is left out: the router asks those that do both only
    where a role has nobody. All workers of a role have one shape, or the router would send to unlike ones alike."""
    for chunk_tokens in sizes:
        for prefill_shape, decode_shape in product(shapes, repeat=2):
            prefill_takes, decode_takes = devices_of(prefill_shape), devices_of(decode_shape)
            if prefill_shape == decode_shape and (workers := devices // decode_takes) >= least:
                yield Arrangement(0, 0, workers, chunk_tokens, decode_shape, decode_shape)
            for prefill in range(least, devices // prefill_takes + 1):
                decode = (devices - prefill * prefill_takes) // decode_takes
                one_more = (prefill + 1) * prefill_takes + decode * decode_takes <= devices
                if decode >= least and not one_more:
                    yield Arrangement(prefill, decode, 0, chunk_tokens, prefill_shape, decode_shape)


@dataclass(frozen=True)
class Migration:
    """`disturbed`: requests that may miss a target for it, at the most. `delay_s` passes before it has its effect."""

    disturbed: float
    delay_s: float


def migration(
    now: Arrangement,
    to: Arrangement,
    load: Load,
    prompt_ms: float,
    startup_s: float,
    moved: Way | None = None,
    ending_s: float = 0.0,
) -> Migration:
    """Of a role that gives workers away, they have their part of its requests; these go on beside the work of the new
    role. A worker computes the prompts that wait for it first, at `prompt_ms` per token; one that is new loads its
    weights first, in `startup_s`. Steps of another length disturb nothing. Workers of another shape are new ones, and
    start by turns, as `moved` says, each when others have ended what they have, in `ending_s`."""
    disturbed = drain_ms = 0.0
    for role in Role:
        stay = to.of(role) if to.shape(role) == now.shape(role) else 0
        given, of = now.of(role) - stay, load.of(role)
        if given > 0:
            disturbed += (of.running + of.waiting_requests) * given / now.of(role)
            drain_ms = max(drain_ms, of.waiting_prompt_tokens / now.of(role) * prompt_ms)
    if moved is not None:
        return Migration(disturbed, moved.starts * (startup_s + ending_s))
    return Migration(disturbed, max(drain_ms / 1e3, startup_s if to.workers > now.workers else 0.0))
