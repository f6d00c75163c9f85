"""Speculation for the engine of one worker, out of what the operator asked for."""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import SlipstreamError
from engine.kv_cache import DTYPES
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.crew import switch_off
from speculation.drafters.base import Surroundings
from speculation.drafters.registry import find_drafter, make_drafter
from speculation.in_batch import InBatch
from speculation.in_prefill import InPrefill
from speculation.protocols import Drafter
from speculation.rules.registry import find_rule
from speculation.settings import Settings


def make_speculator(
    settings: Settings, runner: ModelRunner | GroupRunner, max_requests: int, *, at_work: bool = False
) -> InBatch:
    """For steps of `runner`, of which so many requests are under way at most. Takes as long as it takes to read the
    weights of drafters. Raises ConfigError or ModelError for a drafter that can't be made here; on a worker that is
    `at_work` already that one is switched off, as if it had failed later."""
    failed: dict[str, str] = {}
    drafters = _drafters(settings.drafters, settings, runner, max_requests, failed if at_work else None)
    speculator = InBatch(
        drafters,
        dict.fromkeys(settings.drafters, find_rule(settings.rule)),
        make_controller(settings.controller, Limits(settings.max_budget, settings.drafters, runner.row_times)),
        Acceptance(settings.max_budget),
        vocab_size=runner.config.vocab_size,
        max_budget=settings.max_budget,
    )
    speculator.counters.switched_off.update(failed)
    return speculator


def make_observer(settings: Settings, runner: ModelRunner | GroupRunner, max_requests: int) -> InPrefill | None:
    """For a runner whose prompts are decoded elsewhere; None if the drafters there need no more than tokens. As
    make_speculator otherwise."""
    names = [name for name in settings.drafters if find_drafter(name).needs_prompts]
    return InPrefill(_drafters(names, settings, runner, max_requests, proposes=False)) if names else None


def _drafters(
    names: Iterable[str],
    settings: Settings,
    runner: ModelRunner | GroupRunner,
    max_requests: int,
    failed: dict[str, str] | None = None,
    *,
    proposes: bool = True,
) -> dict[str, Drafter]:
    """`failed`: where it is written down which of them can't be made, and why; without it that is raised."""
    made: dict[str, Drafter] = {}
    for name in names:
        try:
            made[name] = make_drafter(name, _surroundings(settings, name, runner, max_requests, proposes=proposes))
        except SlipstreamError as error:
            if failed is None:
                raise
            switch_off(name, error.message, failed)
    return made


def _surroundings(
    settings: Settings, drafter: str, runner: ModelRunner | GroupRunner, max_requests: int, *, proposes: bool
) -> Surroundings:
    shared = runner.vocabulary() if find_drafter(drafter).shares_vocabulary else None
    return Surroundings(
        vocab_size=runner.config.vocab_size,
        max_budget=settings.max_budget,
        max_requests=max_requests,
        max_memory_bytes=settings.memory_of_each,
        law=settings.law_of(drafter),
        branches=settings.branches,
        weights=settings.weights.get(drafter),
        device=runner.pool.device,
        dtype=DTYPES[runner.layout.dtype],
        num_layers=runner.config.num_layers,
        embedding=None if shared is None else shared.embedding,
        output=None if shared is None else shared.output,
        fingerprint="" if shared is None else shared.fingerprint,
        native=runner.native,
        proposes=proposes,
    )
