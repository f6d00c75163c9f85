"""What a gateway learns of its workers, and what follows for its requests."""

from __future__ import annotations

import pytest

from cluster.break_even import MIN_OBSERVATIONS, BreakEven
from cluster.dispatch import Dispatch
from cluster.router import Candidate
from cluster.routes import Routes
from core.types import Finish, FinishReason, Request, Role, SamplingParams, TokenDelta
from core.wire import WorkerCounters, WorkerStatus
from tests.statuses import status


def route_of(routes: Routes, max_tokens: int, emitted: int = 0, prompt: int = 50) -> tuple[str | None, str]:
    request = Request(
        request_id="r",
        prompt_token_ids=[1] * prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        deadline=0.0,
        emitted_token_ids=[1] * emitted,
    )
    workers = [Candidate(w, f"{w}:1", status(w, role)) for w, role in [("p", Role.PREFILL), ("d", Role.DECODE)]]
    route = routes.choose(routes.way(request), Dispatch(request), workers, None)
    return route.prefill.worker_id if route.prefill else None, route.decode.worker_id


@pytest.mark.parametrize("between", [True, False])
def test_a_tokens_prefill_costs_what_it_took_however_much_was_cached_and_whenever_we_heard(between: bool) -> None:
    """Prompts of 1016 tokens of which 1000 are cached, at 1 ms a token. Hits are counted when a prompt begins and its
    tokens when it ends, and the worker may say how it is `between` the two."""
    known = BreakEven()
    for _ in range(MIN_OBSERVATIONS):
        known.observe_handoff(100, 0.0105)
    routes = Routes(known, max_waiting=10)
    hits = prompts = computed = 0
    for _ in range(20):
        if between:
            routes.heard(_counted(prompts, hits + 1000, computed))
        hits, prompts, computed = hits + 1000, prompts + 1016, computed + 16
        routes.heard(_counted(prompts, hits, computed))
    assert route_of(routes, max_tokens=8, prompt=10) == (None, "d")
    assert route_of(routes, max_tokens=8, prompt=11) == ("p", "d")


def _counted(prompts: int, hits: int, computed: int) -> WorkerStatus:
    counters = WorkerCounters(
        prompt_tokens=prompts, prefix_cache_hits=hits, step_tokens=computed, step_seconds=computed * 0.001
    )
    return status("p", Role.PREFILL, counters=counters)


@pytest.mark.parametrize(("max_tokens", "emitted", "alone"), [(0, 0, True), (1, 0, True), (2, 0, False), (5, 4, True)])
def test_nothing_is_handed_over_of_what_ends_with_its_first_token(max_tokens: int, emitted: int, alone: bool) -> None:
    routes = Routes(BreakEven(min_tokens=0), max_waiting=10)
    assert route_of(routes, max_tokens, emitted) == ((None, "p") if alone else ("p", "d"))
    assert routes.counts["prefill_only" if alone else "handoff"] == 1


@pytest.mark.parametrize("inexact", [True, False])
def test_a_decode_worker_is_not_believed_to_keep_what_a_codec_has_changed(inexact: bool) -> None:
    """A conversation that goes on has its KV there, or has to be handed over anew."""
    workers = [Candidate(w, f"{w}:1", status(w, role)) for w, role in [("p", Role.PREFILL), ("d", Role.DECODE)]]
    routes = Routes(BreakEven(min_tokens=20), max_waiting=10)
    for worker in workers:
        routes.heard(worker.status)
    prompt = list(range(100, 164))
    for tokens, handed_over in [(prompt, True), ([*prompt, *range(16)], inexact)]:
        request = Request(request_id="r", prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=8), deadline=0.0)
        way, dispatch = routes.way(request), Dispatch(request)
        assert (routes.choose(way, dispatch, workers, None).prefill is not None) == handed_over
        for finish in (None, Finish(reason=FinishReason.LENGTH)):
            routes.delivered(
                way, dispatch, TokenDelta(request_id="r", index=0, token_ids=[1], inexact_kv=inexact, finish=finish)
            )
