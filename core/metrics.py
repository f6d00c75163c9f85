"""What a gateway reports to Prometheus, under the names vLLM's dashboards and autoscalers already read.

Requests are measured where they end, at the gateway (GatewayMetrics). Workers count for themselves and send their
counters with every status; WorkerCollector turns the latest ones into series at scrape time. What vLLM has no name for
is `slipstream:…`. Every series has the labels model_name, role and replica.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.errors import SlipstreamError
from core.replan_metrics import ReplanStatus, replan_series
from core.speculation_metrics import Speculating, speculation_counters, speculation_gauges
from core.types import FinishReason, Slo
from core.wire import WorkerCounters, WorkerStatus

LABELS = ("model_name", "role", "replica")
GATEWAY_ROLE = "gateway"

TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
REQUEST_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
TOKEN_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))

NUM_REMEMBERED_WORKERS = 256
"""How many workers that are gone keep their last counters on the page."""


class GatewayMetrics:
    """Counters of one gateway in `registry`. Methods are cheap enough to be called per token."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str, replica: str = "0") -> None:
        self.registry = registry
        self._labels = (model_name, GATEWAY_ROLE, replica)
        ProcessCollector(registry=registry)
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Gap between two deltas.", TPOT_BUCKETS)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean gap per output token of a request.", TPOT_BUCKETS
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", REQUEST_BUCKETS)
        self.prompt_tokens = self._histogram("vllm:request_prompt_tokens", "Prompt length.", TOKEN_BUCKETS)
        self.output_tokens = self._histogram("vllm:request_generation_tokens", "Output length.", TOKEN_BUCKETS)
        self.in_flight = self._gauge("slipstream:gateway_requests_in_flight", "Sequences accepted and not ended.")
        self._ended = self._counter("vllm:request_success", "Sequences ended, by how.", "finished_reason")
        self._refused = self._counter("slipstream:requests_refused", "HTTP requests refused, by error.", "error")
        self._slo = self._counter("slipstream:slo_requests", "Sequences with latency targets, by outcome.", "outcome")

    def track(self, num_prompt_tokens: int, arrived: float, slo: Slo | None = None) -> RequestTimer:
        """Measures one sequence. `arrived` is time.perf_counter() when its HTTP request came in."""
        return RequestTimer(self, num_prompt_tokens, arrived, slo)

    def ended(self, reason: FinishReason) -> None:
        self._ended.labels(*self._labels, reason.value).inc()

    def refused(self, error: SlipstreamError) -> None:
        """An HTTP request got `error` instead of output."""
        self._refused.labels(*self._labels, error.code or error.type).inc()

    def slo_outcome(self, met: bool) -> None:
        self._slo.labels(*self._labels, "met" if met else "missed").inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, buckets=buckets, registry=self.registry).labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=self.registry).labels(*self._labels)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, (*LABELS, label), registry=self.registry)


class RequestTimer:
    """From the acceptance of a sequence to its one end, as a context manager. A body left without `finished` ended by
    its exception: an Exception is an error, anything else (cancellation, a closed generator) an abort."""

    def __init__(self, metrics: GatewayMetrics, num_prompt_tokens: int, arrived: float, slo: Slo | None) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived = arrived
        self._slo = slo
        self._first = self._last = 0.0
        self._num_tokens = 0
        self._reason: FinishReason | None = None

    def tokens(self, count: int) -> None:
        """`count` new tokens arrived now."""
        if not count:
            return
        now = time.perf_counter()
        if self._num_tokens == 0:
            self._first = now
            self._metrics.ttft.observe(now - self._arrived)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        self._num_tokens += count

    def finished(self, reason: FinishReason) -> None:
        self._reason = reason

    @property
    def ttft_s(self) -> float | None:
        """None before the first token."""
        return self._first - self._arrived if self._num_tokens else None

    def __enter__(self) -> Self:
        self._metrics.in_flight.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._metrics.in_flight.dec()
        if self._reason is None:
            self._reason = FinishReason.ERROR if isinstance(error, Exception) else FinishReason.ABORT
        self._metrics.ended(self._reason)
        completed = self._reason in (FinishReason.STOP, FinishReason.LENGTH)
        if completed:
            self._observe_lengths_and_times()
        if self._slo is not None and self._reason is not FinishReason.ABORT:
            self._metrics.slo_outcome(completed and self._meets(self._slo))

    def _observe_lengths_and_times(self) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.observe(self._num_prompt_tokens)
        metrics.output_tokens.observe(self._num_tokens)
        if self._num_tokens:
            metrics.e2e.observe(self._last - self._arrived)
            metrics.decode.observe(self._last - self._first)
        if self._num_tokens > 1:
            metrics.tpot.observe(self._seconds_per_token)

    @property
    def _seconds_per_token(self) -> float:
        """TPOT = (t_last - t_first) / (n - 1)."""
        return (self._last - self._first) / max(1, self._num_tokens - 1)

    def _meets(self, slo: Slo) -> bool:
        ttft_ms = (self._first - self._arrived) * 1000
        return (slo.ttft_ms is None or ttft_ms <= slo.ttft_ms) and (
            slo.tpot_ms is None or self._seconds_per_token * 1000 <= slo.tpot_ms
        )


class _Series(NamedTuple):
    name: str
    text: str
    field: str
    """Of WorkerCounters."""


_COUNTERS = (
    _Series("vllm:prompt_tokens", "Prompt tokens prefilled.", "prompt_tokens"),
    _Series("vllm:generation_tokens", "Tokens generated.", "generated_tokens"),
    _Series("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
    _Series("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
    _Series("vllm:num_preemptions", "Sequences preempted for want of blocks.", "preemptions"),
    _Series("slipstream:engine_steps", "Engine steps.", "steps"),
    _Series("slipstream:engine_step_tokens", "Tokens computed in engine steps.", "step_tokens"),
    _Series("slipstream:engine_step_seconds", "Time spent in engine steps.", "step_seconds"),
    _Series("slipstream:handoffs_committed", "Hand-offs committed, by who took them.", "transfers_committed"),
    _Series("slipstream:handoff_failures", "Hand-offs that failed.", "transfers_failed"),
    _Series("slipstream:handoff_expiries", "Hand-offs whose lease ran out.", "transfers_expired"),
    _Series("slipstream:offers_committed", "Offers of KV that a decode worker has taken.", "offers_committed"),
    _Series("slipstream:offers_failed", "Offers of KV that failed.", "offers_failed"),
    _Series("slipstream:offers_expired", "Offers of KV that nobody asked for or renewed in time.", "offers_expired"),
    _Series("slipstream:offers_aborted", "Offers of KV that either side gave up.", "offers_aborted"),
    _Series("slipstream:handoff_bytes", "Bytes of KV handed off.", "transfer_bytes"),
    _Series("slipstream:handoff_aborts", "Hand-offs that were given up.", "transfers_aborted"),
    _Series(
        "slipstream:handoff_transport_fallbacks", "Transports that could not be used or failed.", "transport_fallbacks"
    ),
    _Series("slipstream:handoff_seconds", "From KV computed and wanted to its commit.", "transfer_seconds"),
    _Series("slipstream:handoff_wait_seconds", "From asking for KV to its first piece.", "transfer_wait_seconds"),
    _Series("slipstream:handoff_wire_seconds", "While KV was pulled.", "transfer_wire_seconds"),
    _Series(
        "slipstream:handoff_overlap_seconds", "While KV was pulled and computed at once.", "transfer_overlap_seconds"
    ),
    _Series("slipstream:handoff_encode_seconds", "Encoding KV that was handed off.", "transfer_encode_seconds"),
    _Series("slipstream:handoff_decode_seconds", "Decoding it, while it was pulled.", "transfer_decode_seconds"),
)


def _kv_cache_usage(worker: WorkerStatus) -> float:
    return 1.0 - worker.num_free_blocks / worker.num_blocks if worker.num_blocks else 0.0


class WorkerCollector(Collector):
    """Reads the workers' latest status at each scrape. Gauges show the live ones. Counters of a worker that has gone
    stay on the page, frozen, so that neither a sum over replicas goes backwards nor a rate jumps."""

    def __init__(
        self,
        workers: Callable[[], Iterable[WorkerStatus]],
        *,
        model_name: str,
        routes: Callable[[], Mapping[str, int]] = dict,
        replanning: Callable[[], ReplanStatus | None] = lambda: None,
    ) -> None:
        """`routes`: how many attempts at sequences went which way."""
        self._workers = workers
        self._routes = routes
        self._replanning = replanning
        self._model_name = model_name
        self._seen: OrderedDict[str, WorkerStatus] = OrderedDict()

    def collect(self) -> Iterator[Metric]:
        live = list(self._workers())
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", live, lambda w: w.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting for blocks.", live, lambda w: w.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", live, _kv_cache_usage)
        yield self._gauge(
            "slipstream:num_waiting_tokens", "Prompt tokens waiting.", live, lambda w: w.num_waiting_tokens
        )
        self._remember(live)
        for series in _COUNTERS:
            yield self._counter(series)
        yield self._wire_bytes()
        yield from speculation_counters(self._speculating(self._seen.values()), LABELS)
        yield from speculation_gauges(self._speculating(live), LABELS)
        routed = CounterMetricFamily(
            "slipstream:routed", "Sequences sent to workers, by way.", labels=(*LABELS, "route")
        )
        for route, count in self._routes().items():
            routed.add_metric([self._model_name, GATEWAY_ROLE, "0", route], count)
        yield routed
        if (replanning := self._replanning()) is not None:
            yield from replan_series(replanning, LABELS, (self._model_name, GATEWAY_ROLE, "0"))

    def _gauge(
        self, name: str, text: str, live: list[WorkerStatus], value: Callable[[WorkerStatus], float]
    ) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        for worker in live:
            family.add_metric(self._labels(worker), value(worker))
        return family

    def _counter(self, series: _Series) -> CounterMetricFamily:
        family = CounterMetricFamily(series.name, series.text, labels=LABELS)
        for worker in self._seen.values():
            family.add_metric(self._labels(worker), _read(worker.counters, series.field))
        return family

    def _wire_bytes(self) -> CounterMetricFamily:
        text = "Bytes on the wire of KV handed off, by codec."
        family = CounterMetricFamily("slipstream:handoff_wire_bytes", text, labels=(*LABELS, "codec"))
        for worker in self._seen.values():
            for codec, count in worker.counters.transfer_wire_bytes.items():
                family.add_metric([*self._labels(worker), codec], count)
        return family

    def _speculating(self, workers: Iterable[WorkerStatus]) -> list[Speculating]:
        return [(self._labels(w), w.counters.speculation) for w in workers if w.counters.speculation is not None]

    def _remember(self, live: list[WorkerStatus]) -> None:
        for worker in live:
            self._seen[worker.worker_id] = worker
            self._seen.move_to_end(worker.worker_id)
        while len(self._seen) > NUM_REMEMBERED_WORKERS + len(live):
            self._seen.popitem(last=False)

    def _labels(self, worker: WorkerStatus) -> list[str]:
        return [self._model_name, worker.role.value, worker.worker_id]


def _read(counters: WorkerCounters, field: str) -> float:
    return float(getattr(counters, field))
