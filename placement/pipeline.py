"""DistServe's simulated system (arXiv:2401.09670): one pipeline for prefill and one for decode, or one for both.

A stage is one tensor parallel group. It takes batches in turns and never waits when it has work: prompts first, else
sequences that decode. KV moves in no time and takes no memory. This file is the definition; `native.py` computes the
same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from core.errors import ConfigError
from placement.latency import DistServeLatency
from placement.outcome import Outcome
from placement.workload import Times, Workload

DECODE_BATCH_TOKENS = 50_000
"""Most tokens, Σ(context + 1), of one decode batch."""


@dataclass(frozen=True)
class Pipelines:
    """`prefill_cap`: most prompt tokens in one batch. When `colocated` the prefill pipeline does both, with `decode`
    for its decode steps, and `decode_stages` equals `prefill_stages`."""

    prefill: DistServeLatency
    prefill_stages: int
    prefill_cap: int
    decode: DistServeLatency
    decode_stages: int
    colocated: bool = False

    def check(self, workload: Workload) -> None:
        """Raise ConfigError for a request that would wait for ever."""
        longest = int(workload.prompt_tokens.max())
        if longest > self.prefill_cap:
            raise ConfigError(f"a prompt of {longest} tokens doesn't fit a prefill batch of {self.prefill_cap} tokens")
        longest = int((workload.prompt_tokens.astype(np.int64) + workload.output_tokens).max())
        if longest > DECODE_BATCH_TOKENS:
            raise ConfigError(f"a context of {longest} tokens doesn't fit a decode batch of {DECODE_BATCH_TOKENS}")


def to_outcome(workload: Workload, arrivals_ms: Times, first_ms: Times, last_ms: Times) -> Outcome:
    """DistServe counts the first token with the prompt, and divides what comes after by all output tokens."""
    return Outcome(first_ms - arrivals_ms, (last_ms - first_ms) / workload.output_tokens, last_ms - arrivals_ms)


def simulate_plainly(pipelines: Pipelines, workload: Workload, rate: float) -> Outcome:
    """The workload at `rate` requests per second. Raises ConfigError for a request that can never be served."""
    pipelines.check(workload)
    arrivals = workload.arrivals_ms(rate)
    first, last = _Simulation(pipelines, workload).run(arrivals)
    return to_outcome(workload, arrivals, first, last)


@dataclass
class _Stage:
    """`prompts` has batches once they left the first stage, and single prompts before."""

    index: int
    first: bool
    last: bool
    decodes_only: bool
    prompts: deque[list[int]] = field(default_factory=deque)
    decodes: deque[int] = field(default_factory=deque)
    busy: bool = False


_ARRIVAL, _END, _START = range(3)


class _Simulation:
    """Events at one instant run in the order in which they were made, but what a stage takes up is decided last, so
    that it sees everything that came at that instant."""

    def __init__(self, pipelines: Pipelines, workload: Workload) -> None:
        self.pipelines = pipelines
        self.prompt: Sequence[int] = workload.prompt_tokens.tolist()
        self.output: Sequence[int] = workload.output_tokens.tolist()
        self.decoded = [0] * len(workload)
        self.first = np.zeros(len(workload))
        self.last = np.zeros(len(workload))
        self.events: list[tuple[float, bool, int, int, int, list[int]]] = []
        self.made = 0
        self.stages = _stages(pipelines.prefill_stages, 0, decodes_only=False)
        self.decode_head = self.stages[0]
        if not pipelines.colocated:
            decode = _stages(pipelines.decode_stages, len(self.stages), decodes_only=True)
            self.decode_head = decode[0]
            self.stages += decode

    def run(self, arrivals: Times) -> tuple[Times, Times]:
        for request, time in enumerate(arrivals.tolist()):
            self._push(time, _ARRIVAL, 0, [request])
        while self.events:
            now, _, _, kind, index, batch = heappop(self.events)
            stage = self.stages[index]
            if kind == _ARRIVAL:
                stage.prompts.append(batch)
                self._push(now, _START, index, [])
            elif kind == _START:
                self._start(now, stage)
            else:
                self._end(now, stage, batch)
        return self.first, self.last

    def _push(self, time: float, kind: int, stage: int, batch: list[int]) -> None:
        self.made += 1
        heappush(self.events, (time, kind == _START, self.made, kind, stage, batch))

    def _start(self, now: float, stage: _Stage) -> None:
        if stage.busy or not (stage.prompts or stage.decodes):
            return
        batch, took = self._take_prompts(stage) if stage.prompts else self._take_decodes(stage)
        stage.busy = True
        self._push(now + took, _END, stage.index, batch)

    def _take_prompts(self, stage: _Stage) -> tuple[list[int], float]:
        batch = stage.prompts.popleft()
        tokens = sum(self.prompt[request] for request in batch)
        while stage.first and stage.prompts and tokens + self.prompt[stage.prompts[0][0]] <= self.pipelines.prefill_cap:
            [request] = stage.prompts.popleft()
            batch = [*batch, request]
            tokens += self.prompt[request]
        squares = sum(self.prompt[request] ** 2 for request in batch)
        stages = self.pipelines.prefill_stages
        return batch, self.pipelines.prefill.prefill_stage_ms(tokens, squares, stages=stages, first=stage.first)

    def _take_decodes(self, stage: _Stage) -> tuple[list[int], float]:
        batch: list[int] = []
        context = 0
        while stage.decodes:
            more = self.prompt[stage.decodes[0]] + self.decoded[stage.decodes[0]]
            if context + more + len(batch) + 1 > DECODE_BATCH_TOKENS:
                break
            batch.append(stage.decodes.popleft())
            context += more
        stages = self.pipelines.decode_stages
        return batch, self.pipelines.decode.decode_stage_ms(context, len(batch), stages=stages, first=stage.first)

    def _end(self, now: float, stage: _Stage, batch: list[int]) -> None:
        stage.busy = False
        self._push(now, _START, stage.index, [])
        if self._is_prefill(stage, batch):
            self._prompts_end(now, stage, batch)
        else:
            self._decodes_end(now, stage, batch)

    def _is_prefill(self, stage: _Stage, batch: list[int]) -> bool:
        return not stage.decodes_only and self.first[batch[0]] == 0.0

    def _prompts_end(self, now: float, stage: _Stage, batch: list[int]) -> None:
        if stage.last:
            self.first[batch] = now
            self._hand_decodes(now, self.decode_head, batch)
            return
        self.stages[stage.index + 1].prompts.append(batch)
        self._push(now, _START, stage.index + 1, [])

    def _decodes_end(self, now: float, stage: _Stage, batch: list[int]) -> None:
        if not stage.last:
            self._hand_decodes(now, self.stages[stage.index + 1], batch)
            return
        for request in batch:
            self.decoded[request] += 1
        going_on = [request for request in batch if self.decoded[request] < self.output[request]]
        self.last[[request for request in batch if self.decoded[request] == self.output[request]]] = now
        self._hand_decodes(now, self.decode_head, going_on)

    def _hand_decodes(self, now: float, stage: _Stage, batch: list[int]) -> None:
        stage.decodes.extend(batch)
        self._push(now, _START, stage.index, [])


def _stages(count: int, offset: int, *, decodes_only: bool) -> list[_Stage]:
    return [
        _Stage(offset + number, number == 0, number == count - 1, decodes_only=decodes_only) for number in range(count)
    ]
