"""One run: requests that come when they are due, on a cluster whose workers are replanned, or stay as they are."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from cluster.config.tree import SlipstreamConfig
from cluster.local import LocalCluster, local_cluster
from cluster.membership import Plan
from cluster.recorder import Recorder
from cluster.replanning import Replan
from core.errors import SlipstreamError
from core.replan_metrics import Decided
from core.served import Served
from core.types import FinishReason, Request, SamplingParams

_TIMEOUT_S = 600.0
_LOOK_S = 0.05
_WARM_UPS = 3
"""Of each worker, at once: a first step of a kind takes longer than later ones."""

Due = tuple[float, int, int]
"""Seconds from the beginning, prompt and output tokens."""


class Answer(Struct, frozen=True):
    """Of one request, `due_s` from the beginning. It is whole if it ended once, with all its tokens, and none of them
    came twice or out of turn."""

    due_s: float
    served: Served
    whole: bool


class Run(Struct, frozen=True):
    """`changes`: what was decided, `at_s` from the beginning, and when each was `done`: workers were as decided, and
    the others gone. None if another change came before."""

    replanned: bool
    answers: list[Answer]
    changes: list[Decided]
    done: list[float | None] = []


@dataclass
class _Load:
    """Requests to a cluster. Their prompts are of random tokens, so that no two begin alike."""

    cluster: LocalCluster
    vocabulary: int
    seed: int

    async def warm_up(self, requests: Sequence[Due], workers: int) -> None:
        """With requests of all parts of the load."""
        chosen = random.Random(self.seed).sample(list(requests), min(len(requests), _WARM_UPS * workers))
        await asyncio.gather(*(self.ask(-1 - number, due) for number, due in enumerate(chosen)))

    async def offer(self, requests: Sequence[Due]) -> list[Answer]:
        """Each when it is due, whatever has become of those before."""
        began = time.monotonic()

        async def one(number: int, due: Due) -> Answer:
            await asyncio.sleep(max(0.0, began + due[0] - time.monotonic()))
            return await self.ask(number, due)

        return list(await asyncio.gather(*(one(number, due) for number, due in enumerate(requests))))

    async def ask(self, number: int, due: Due) -> Answer:
        at, prompt, output = due
        tokens = random.Random(f"{self.seed} {number}").choices(range(self.vocabulary), k=prompt)
        request = Request(
            request_id=f"shift-{self.seed}-{number}",
            prompt_token_ids=tokens,
            sampling=SamplingParams(max_tokens=output, temperature=0.0),
            deadline=time.time() + _TIMEOUT_S,
        )
        recorder = Recorder()
        record = recorder.begin(request)
        count = ends = 0
        in_turn = True
        try:
            async for delta in self.cluster.backend.generate(request):
                record.heard(delta)
                in_turn = in_turn and delta.index == count and not ends
                count += len(delta.token_ids)
                ends += delta.finish is not None
        except SlipstreamError:
            record.end(FinishReason.ERROR)
        (served,) = recorder.take()
        whole = in_turn and ends == 1 and count == output and served.ended is FinishReason.LENGTH
        return Answer(at, served, whole)


class _Watch:
    """When the workers were first as each plan has them, by its number: Unix times."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.done: dict[int, float] = {}

    async def go_on(self) -> None:
        while True:
            plan = self._cluster.membership.plan
            if plan.plan_id not in self.done and self._is(plan):
                self.done[plan.plan_id] = time.time()
            await asyncio.sleep(_LOOK_S)

    def _is(self, plan: Plan) -> bool:
        cluster = self._cluster
        serving = [worker for worker in cluster.backend.status().workers if not worker.leaving]
        there = Counter((worker.role, cluster.shapes[worker.worker_id] if plan.shapes else None) for worker in serving)
        wanted = Counter({(role, plan.shapes.get(role)): count for role, count in plan.wanted.items()})
        return there == wanted and len(cluster.nodes) == plan.workers and not cluster.stopping


async def measure(
    config: SlipstreamConfig,
    folder: Path,
    requests: Sequence[Due],
    replan: Replan | None,
    *,
    threads: int,
    vocabulary: int,
    seed: int,
) -> Run:
    """Serve the requests, with `replan` or without."""
    async with local_cluster(config, folder, threads, replan) as cluster:
        load = _Load(cluster, vocabulary, seed)
        await load.warm_up(requests, config.cluster.num_workers)
        began, watch = time.time(), _Watch(cluster)
        watching = asyncio.create_task(watch.go_on())
        answers = await load.offer(requests)
        watching.cancel()
        changes = [] if cluster.replanning is None else cluster.replanning.status.decisions
        last = cluster.membership.plan.plan_id
    numbers = range(last - len(changes) + 1, last + 1)
    done = [watch.done[number] - began if number in watch.done else None for number in numbers]
    return Run(replan is not None, answers, [replace(change, at_s=change.at_s - began) for change in changes], done)
