"""Which arrangements a cluster can be brought into, and what changing to one costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.types import Role
from placement.arrangement import Arrangement
from placement.load import Load


def arrangements(workers: int, least: int, sizes: Sequence[int]) -> Iterator[Arrangement]:
    """Of so many workers: all do both, or every split with at least `least` in each role, with steps of any of the
    sizes. Some of each is left out: the router asks those that do both only where a role has nobody."""
    for chunk_tokens in sizes:
        if workers >= least:
            yield Arrangement(0, 0, workers, chunk_tokens)
        for prefill in range(least, workers - least + 1):
            yield Arrangement(prefill, workers - prefill, 0, chunk_tokens)


@dataclass(frozen=True)
class Migration:
    """`disturbed`: requests that may miss a target for it, at the most. `delay_s` passes before it has its effect."""

    disturbed: float
    delay_s: float


def migration(now: Arrangement, to: Arrangement, load: Load, prompt_ms: float, startup_s: float) -> Migration:
    """Of a role that gives workers away, they have their part of its requests; these go on beside the work of the new
    role. A worker computes the prompts that wait for it first, at `prompt_ms` per token; one that is new loads its
    weights first, in `startup_s`. Steps of another length disturb nothing."""
    disturbed = drain_ms = 0.0
    for role in Role:
        given, of = now.of(role) - to.of(role), load.of(role)
        if given > 0:
            disturbed += (of.running + of.waiting_requests) * given / now.of(role)
            drain_ms = max(drain_ms, of.waiting_prompt_tokens / now.of(role) * prompt_ms)
    return Migration(disturbed, max(drain_ms / 1e3, startup_s if to.workers > now.workers else 0.0))
