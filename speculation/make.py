"""Speculation for the engine of one worker, out of what the operator asked for."""

from __future__ import annotations

from engine.kv_cache import DTYPES
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.drafters.base import Surroundings
from speculation.drafters.registry import make_drafter
from speculation.in_batch import InBatch
from speculation.rules.registry import find_rule
from speculation.settings import Settings


def make_speculator(settings: Settings, runner: ModelRunner | GroupRunner, max_requests: int) -> InBatch:
    """For steps of `runner`, of which so many requests are under way at most. Takes as long as it takes to read the
    weights of drafters. Raises ConfigError or ModelError for a drafter that can't be made here."""
    drafters = {
        name: make_drafter(name, _surroundings(settings, name, runner, max_requests)) for name in settings.drafters
    }
    return InBatch(
        drafters,
        dict.fromkeys(settings.drafters, find_rule(settings.rule)),
        make_controller(settings.controller, Limits(settings.max_budget, settings.drafters)),
        Acceptance(settings.max_budget),
        vocab_size=runner.config.vocab_size,
        max_budget=settings.max_budget,
    )


def _surroundings(
    settings: Settings, drafter: str, runner: ModelRunner | GroupRunner, max_requests: int
) -> Surroundings:
    return Surroundings(
        vocab_size=runner.config.vocab_size,
        max_budget=settings.max_budget,
        max_requests=max_requests,
        max_memory_bytes=settings.max_memory_bytes // len(settings.drafters),
        law=settings.law_of(drafter),
        branches=settings.branches,
        weights=settings.weights.get(drafter),
        device=runner.pool.device,
        dtype=DTYPES[runner.layout.dtype],
        num_layers=runner.config.num_layers,
    )
