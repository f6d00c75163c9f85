"""All ranks of a group in one process, each in a thread of its own: no default group is involved, so they can be."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from engine.kv_cache import KVPool
from engine.model_config import ModelConfig
from engine.parallel.group import Group, connect
from engine.parallel.split import Split
from engine.plan import make_plan
from engine.runner import ModelRunner
from engine.step import StepBatch, StepOutput
from tests.engine.driver import BLOCK_SIZE

T = TypeVar("T")


class Ranks:
    """Looks like a ModelRunner to tests.engine.driver.Driver."""

    def __init__(self, folder: Path, meetings: Path, tp_size: int, pp_size: int, **options: Any) -> None:
        self.splits = list(Split(tp_size, pp_size).all())
        self._threads = ThreadPoolExecutor(len(self.splits))
        self.config = ModelConfig.from_folder(folder)
        options = {"dtype": "float32", "device": "cpu", "num_blocks": 200, "block_size": BLOCK_SIZE} | options
        plan = make_plan(folder, self.config, **options)
        self.pool = KVPool(plan.layout, plan.num_blocks)
        assert self.pool.fd is not None
        memory, meeting = self.pool.fd, meetings / uuid.uuid4().hex

        def build(split: Split) -> tuple[Group, ModelRunner]:
            group = connect(split, meeting, torch.device("cpu"))
            return group, ModelRunner.build(plan, self.config, group=group, memory=memory)

        self.groups, self.runners = zip(*self.each(build, self.splits), strict=True)

    def each(self, work: Callable[..., T], *columns: Any) -> list[T]:
        """`work` on every rank at a time."""
        futures = [self._threads.submit(work, *row) for row in zip(*columns, strict=True)]
        return [future.result(60) for future in futures]

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        """What the first rank of the last stage says, with the taps of all stages."""
        outputs = self.each(lambda runner: runner.submit(batch).result(), self.runners)
        taps = {layer: tap for output in outputs for layer, tap in output.taps.items()}
        answer = next(output for split, output in zip(self.splits, outputs, strict=True) if split.last)
        future: Future[StepOutput] = Future()
        future.set_result(replace(answer, taps=taps))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        self.pool.close()
