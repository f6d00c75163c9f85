from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from core.errors import Overloaded
from core.metrics import NUM_REMEMBERED_WORKERS, GatewayMetrics, WorkerCollector
from core.types import FinishReason, Role, Slo
from core.wire import DrafterCounters, SpeculationCounters, WorkerCounters, WorkerStatus
from tests.statuses import status

GATEWAY = {"model_name": "m", "role": "gateway", "replica": "0"}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GatewayMetrics:
    return GatewayMetrics(registry, model_name="m")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def read(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, GATEWAY | labels)


def test_a_request_is_measured_once_where_it_ends(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: list[float]
) -> None:
    with metrics.track(7, arrived=99.0) as timer:
        assert read(registry, "slipstream:gateway_requests_in_flight") == 1
        timer.tokens(1)
        for count in (0, 2, 1):
            clock[0] += 0.5
            timer.tokens(count)
        timer.finished(FinishReason.STOP)
    sums = {name: read(registry, f"vllm:{name}_sum") for name in SUMS}
    assert sums == SUMS
    assert read(registry, "vllm:inter_token_latency_seconds_count") == 2
    assert read(registry, "vllm:request_success_total", finished_reason="stop") == 1
    assert read(registry, "slipstream:gateway_requests_in_flight") == 0


SUMS = {
    "time_to_first_token_seconds": 1.0,
    "inter_token_latency_seconds": 1.5,
    "request_time_per_output_token_seconds": 0.5,
    "e2e_request_latency_seconds": 2.5,
    "request_decode_time_seconds": 1.5,
    "request_prompt_tokens": 7,
    "request_generation_tokens": 4,
}


@pytest.mark.parametrize(("error", "reason"), [(ValueError(), "error"), (GeneratorExit(), "abort")])
def test_an_exception_is_an_end_too(
    registry: CollectorRegistry, metrics: GatewayMetrics, error: BaseException, reason: str
) -> None:
    with pytest.raises(type(error)), metrics.track(7, arrived=0):
        raise error
    assert read(registry, "vllm:request_success_total", finished_reason=reason) == 1
    assert read(registry, "vllm:request_prompt_tokens_count") == 0
    assert read(registry, "slipstream:gateway_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("slo", "outcome"),
    [
        (Slo(ttft_ms=1000), "met"),
        (Slo(ttft_ms=999), "missed"),
        (Slo(tpot_ms=500), "met"),
        (Slo(ttft_ms=2000, tpot_ms=499), "missed"),
    ],
)
def test_attainment_needs_both_targets(
    registry: CollectorRegistry, metrics: GatewayMetrics, clock: list[float], slo: Slo, outcome: str
) -> None:
    with metrics.track(1, arrived=99.0, slo=slo) as timer:
        timer.tokens(1)
        clock[0] += 0.5
        timer.tokens(1)
        timer.finished(FinishReason.LENGTH)
    assert read(registry, "slipstream:slo_requests_total", outcome=outcome) == 1


def test_refusals_are_counted_by_error(registry: CollectorRegistry, metrics: GatewayMetrics) -> None:
    metrics.refused(Overloaded("full"))
    assert read(registry, "slipstream:requests_refused_total", error="overloaded") == 1


# --- workers ---------------------------------------------------------------------------------------------------------


def worker(worker_id: str, role: Role = Role.DECODE, **counters: int) -> WorkerStatus:
    busy = {"num_running": 2, "num_waiting": 1, "num_waiting_tokens": 30, "num_free_blocks": 1, "num_blocks": 4}
    return status(worker_id, role, counters=WorkerCounters(**counters), **busy)


def of(registry: CollectorRegistry, name: str, worker_id: str, role: str = "decode") -> float | None:
    return registry.get_sample_value(name, {"model_name": "m", "role": role, "replica": worker_id})


def total(registry: CollectorRegistry, name: str) -> float:
    return sum(s.value for family in registry.collect() for s in family.samples if s.name == name)


def test_workers_report_by_role_and_replica(registry: CollectorRegistry) -> None:
    live = [worker("a", Role.PREFILL, transfers_committed=3, transfer_bytes=10), worker("b", transfers_expired=1)]
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    assert of(registry, "vllm:num_requests_running", "b") == 2
    assert of(registry, "vllm:num_requests_waiting", "b") == 1
    assert of(registry, "vllm:kv_cache_usage_perc", "b") == 0.75
    assert of(registry, "slipstream:handoffs_committed_total", "a", "prefill") == 3
    assert of(registry, "slipstream:handoff_bytes_total", "a", "prefill") == 10
    assert of(registry, "slipstream:handoff_expiries_total", "b") == 1
    assert of(registry, "slipstream:handoff_failures_total", "b") == 0


def test_bytes_on_the_wire_are_told_apart_by_codec(registry: CollectorRegistry) -> None:
    counters = WorkerCounters(
        transfer_bytes=90, transfer_wire_bytes={"none": 30, "int8": 31}, transfer_decode_seconds=0.5
    )
    registry.register(WorkerCollector(lambda: [replace(worker("a"), counters=counters)], model_name="m"))
    labels = {"model_name": "m", "role": "decode", "replica": "a"}
    for codec, count in counters.transfer_wire_bytes.items():
        assert registry.get_sample_value("slipstream:handoff_wire_bytes_total", labels | {"codec": codec}) == count
    assert of(registry, "slipstream:handoff_decode_seconds_total", "a") == 0.5
    assert of(registry, "slipstream:handoff_encode_seconds_total", "a") == 0


def drafter(name: str, version: str = "", alarm: str = "", *, times: int = 1) -> DrafterCounters:
    return DrafterCounters(
        drafter=name,
        version=version,
        drafts=10 * times,
        draft_tokens=25 * times,
        accepted_tokens=8 * times,
        alpha_sum=6.5 * times,
        alpha_positions=13 * times,
        drafts_per_position=[10 * times, 9 * times, 6 * times],
        accepted_per_position=[6 * times, 2 * times],
        alarm=alarm,
    )


def speculating(*drafters: DrafterCounters, off: Sequence[str] = ()) -> WorkerCounters:
    counted = SpeculationCounters(drafters=list(drafters), switched_off=list(off), draft_seconds=0.5, verify_seconds=2)
    return WorkerCounters(speculation=counted)


def test_drafts_are_counted_over_all_drafters_and_by_drafter_and_version(registry: CollectorRegistry) -> None:
    counters = speculating(drafter("suffix"), drafter("head", "v1", "low", times=2), drafter("head", "v2"))
    live = [worker("p", Role.PREFILL), replace(worker("a"), counters=counters)]
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    own = {"model_name": "m", "role": "decode", "replica": "a"}
    totals = {name: of(registry, f"vllm:spec_decode_num_{name}_total", "a") for name in TOTALS}
    assert totals == TOTALS
    assert of(registry, "vllm:spec_decode_num_drafts_total", "p", "prefill") is None
    for position, accepted in enumerate([24, 8]):
        at = own | {"position": str(position)}
        assert registry.get_sample_value("vllm:spec_decode_num_accepted_tokens_per_pos_total", at) == accepted
    at = own | {"position": "2"}
    assert registry.get_sample_value("slipstream:spec_decode_num_drafts_per_pos_total", at) == 24
    for version, drafts, alarm in (("v1", 20, -1), ("v2", 10, 0)):
        head = own | {"drafter": "head", "version": version}
        assert registry.get_sample_value("slipstream:drafter_drafts_total", head) == drafts
        assert registry.get_sample_value("slipstream:drafter_acceptance_alarm", head) == alarm
        alpha = [registry.get_sample_value(f"slipstream:drafter_alpha_{of}", head) for of in ("sum", "count")]
        assert alpha == [0.65 * drafts, 1.3 * drafts]
        for name, counts in (("drafts", (10, 9, 6)), ("accepted_tokens", (6, 2))):
            found = [
                registry.get_sample_value(f"slipstream:drafter_{name}_per_pos_total", head | {"position": str(place)})
                for place in range(4)
            ]
            assert found == [*(count * drafts / 10 for count in counts), *(None,) * (4 - len(counts))]
    assert of(registry, "slipstream:spec_decode_draft_seconds_total", "a") == 0.5
    assert of(registry, "slipstream:spec_decode_verify_seconds_total", "a") == 2


TOTALS = {"drafts": 40, "draft_tokens": 100, "accepted_tokens": 32}


def test_drafters_that_failed_and_acceptance_too_good_to_be_true_are_told(registry: CollectorRegistry) -> None:
    live = [replace(worker("a"), counters=speculating(drafter("head", "v1", "high"), off=["suffix"]))]
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    own = {"model_name": "m", "role": "decode", "replica": "a"}
    assert registry.get_sample_value("slipstream:drafter_switched_off", own | {"drafter": "suffix"}) == 1
    head = own | {"drafter": "head", "version": "v1"}
    assert registry.get_sample_value("slipstream:drafter_acceptance_alarm", head) == 1
    live.clear()
    assert total(registry, "slipstream:drafter_switched_off") == 0
    assert total(registry, "slipstream:drafter_drafts_total") == 10


def test_totals_do_not_go_backwards_when_a_worker_goes(registry: CollectorRegistry) -> None:
    live = [worker("a", preemptions=5), worker("b", preemptions=7)]
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    assert total(registry, "vllm:num_preemptions_total") == 12
    live.pop()
    assert total(registry, "vllm:num_preemptions_total") == 12
    assert total(registry, "vllm:num_requests_running") == 2
    live.append(worker("c", preemptions=1))
    assert total(registry, "vllm:num_preemptions_total") == 13


def test_a_worker_that_changes_role_is_counted_once(registry: CollectorRegistry) -> None:
    live = [worker("a", Role.PREFILL, steps=5)]
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    assert total(registry, "slipstream:engine_steps_total") == 5
    live[:] = [worker("a", Role.DECODE, steps=6)]
    assert total(registry, "slipstream:engine_steps_total") == 6


def test_memory_of_gone_workers_is_bounded(registry: CollectorRegistry) -> None:
    live: list[WorkerStatus] = []
    registry.register(WorkerCollector(lambda: live, model_name="m"))
    for i in range(NUM_REMEMBERED_WORKERS + 50):
        live[:] = [worker(str(i), steps=1)]
        total(registry, "slipstream:engine_steps_total")
    assert total(registry, "slipstream:engine_steps_total") <= NUM_REMEMBERED_WORKERS + 1
