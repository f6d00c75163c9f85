"""Serves a layout on this machine, every worker and the gateway in a process of its own, and puts the requests of a
workload to it when they are due, whatever became of those before."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np
import uvloop

from bench.planning.part import Part
from bench.processes import Module, running
from bench.serving.client import Client
from bench.serving.http import HttpClient
from bench.serving.load import offer
from bench.serving.timeline import Timeline
from cluster.config.loading import validated
from cluster.membership import Member
from core.errors import Unavailable
from core.wire import STATUS_PERIOD_S
from engine.model_config import ModelConfig
from placement.outcome import Outcome
from placement.profile import Setting
from placement.workload import Workload

_TIMEOUT_S = 600.0
_WARM_UPS = 4
"""Of each worker, at once and twice over: a first step of a kind takes longer than later ones."""


class Computed(NamedTuple):
    """By all workers: milliseconds in steps, and how many steps."""

    ms: float
    steps: float

    def since(self, before: Computed) -> Computed:
        return Computed(*(now - then for now, then in zip(self, before, strict=True)))


class Server:
    """A model that is served at `url`. Prompts end in the `questions`, one after the other and over and over."""

    def __init__(self, url: str, model: str, vocabulary: int, questions: Sequence[list[int]] = ()) -> None:
        self._url = url
        self._model = model
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._numbers = itertools.count()
        self._questions = itertools.cycle(questions or [[]])
        self._shared: list[int] = []
        """With which prompts begin, as far as a cache is to have them."""

    def warm_up(self, workers: int, workload: Workload) -> None:
        """With requests of its middle size, which begin with all that caches are to have. Raises Unavailable."""
        prompt, output = (int(np.median(lengths)) for lengths in (workload.prompt_tokens, workload.output_tokens))
        cached = int(workload.cached_tokens.max())
        columns = (
            np.full(_WARM_UPS * workers, tokens, np.int32) for tokens in (max(prompt, cached + 1), output, cached)
        )
        prompts, outputs, hits = columns
        for _ in range(2):
            self.outcome(Workload(prompts, outputs, np.zeros(len(prompts)), hits), 1.0)

    def outcome(self, workload: Workload, rate: float) -> Outcome:
        """Raises Unavailable if a request fails."""
        return outcome_of(self.timelines(workload, rate), workload)

    def computed(self) -> Computed:
        """So far, if nothing is under way: waits until workers have told."""
        time.sleep(2 * STATUS_PERIOD_S)
        told = httpx.get(f"{self._url}/metrics", timeout=_TIMEOUT_S).text
        seconds, steps = (
            sum(map(float, re.findall(rf"^slipstream:engine_{name}_total\{{[^}}]*\}} (\S+)$", told, re.MULTILINE)))
            for name in ("step_seconds", "steps")
        )
        return Computed(1e3 * seconds, steps)

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]:
        """Of the requests, so many per second. Prompts begin alike for as many tokens as are to be cached of them; what
        follows is random, so that no two go on alike, up to the question, if there is one; of a question that is too
        long there is the end."""
        http = HttpClient(f"{self._url}/v1/completions", {})
        requests = [http.request(body, f"plan-{next(self._numbers)}") for body in self._bodies(workload)]
        offsets = (workload.arrivals_ms(rate) / 1000.0).tolist()
        client = Client(http, _TIMEOUT_S, keep_text=False)

        async def run() -> list[Timeline]:
            try:
                return (await offer(client, requests, offsets)).timelines
            finally:
                http.close()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())

    def _bodies(self, workload: Workload) -> Iterator[bytes]:
        columns = (workload.prompt_tokens, workload.output_tokens, workload.cached_tokens)
        for prompt, output, cached in zip(*(column.tolist() for column in columns), strict=True):
            self._shared += self._random.choices(range(self._vocabulary), k=max(0, cached - len(self._shared)))
            rest = prompt - cached
            question = next(self._questions)[-rest:]
            between = self._random.choices(range(self._vocabulary), k=rest - len(question))
            body: dict[str, Any] = {
                "model": self._model,
                "prompt": self._shared[:cached] + between + question,
                "max_tokens": output,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,  # so that a token without text of its own is sent when it comes
            }
            yield msgspec.json.encode(body)


def outcome_of(timelines: list[Timeline], workload: Workload) -> Outcome:
    """Raises Unavailable for a request that failed, or was answered with fewer tokens than were asked for."""
    for timeline, wanted in zip(timelines, workload.output_tokens.tolist(), strict=True):
        if not timeline.completed or timeline.output_tokens != wanted:
            ended = timeline.error or f"{timeline.output_tokens} of {wanted} tokens came"
            raise Unavailable(f"request {timeline.index} of the load failed: {ended}")
    columns = [(t.ttft, t.tpot or 0.0, t.latency) for t in timelines]
    ttft, tpot, e2e = np.array(columns).T * 1000.0
    return Outcome(ttft, tpot, e2e)


@contextmanager
def serving(
    tree: dict[str, Any], folder: Path, setting: Setting, questions: Sequence[list[int]] = ()
) -> Iterator[Server]:
    """The workers of the configuration `tree` and a gateway. On a CPU a process has its part of cpus_per_worker, or as
    many threads as in the setting. `questions` as for Server. Raises ConfigError if one does not come up."""
    tree = tree | {"gateway": {"port": 0}}
    config = validated(tree)
    workers: list[Module] = []
    used = 0
    for role, count in config.cluster.roles.items():
        own = config.for_role(role)
        ranks, cpus = own.engine.ranks, own.cluster.cpus_per_worker
        threads = setting.threads if cpus is None else max(1, int(cpus / ranks))
        for index in range(count):
            part = Part(tree, str(folder), f"{role}-{index}", role, threads)
            workers.append(_module(part, None if setting.device == "cpu" else range(used, used + ranks)))
            used += ranks
    with running(workers) as started:
        members = [msgspec.json.decode(worker.ready, type=Member) for worker in started]
        with running([_module(Part(tree, str(folder), members=members))]) as (gateway,):
            yield Server(gateway.ready, config.served_name, ModelConfig.from_folder(folder).vocab_size, questions)


def _module(part: Part, devices: range | None = None) -> Module:
    """On these of its GPUs."""
    environment = {"OMP_NUM_THREADS": str(part.threads)}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    told = part.worker_id or "the gateway"
    return Module("bench.planning.part", msgspec.json.encode(part).decode(), told, environment)
