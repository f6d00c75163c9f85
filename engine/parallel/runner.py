"""The leader of a group: implements engine.step.Runner over rank processes. A step goes to all of them and is over when
the last has answered; with PP several are in flight, one in each stage.

A rank that dies, fails or says nothing for too long ends the group: all processes, and every step in flight with an
InternalError that says which rank it was. The runner is then replaced, not repaired.
"""

from __future__ import annotations

import itertools
import logging
import selectors
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

from core.errors import InternalError
from engine.kv_cache import DTYPES, GroupPool, KVPool, Pool
from engine.kv_layout import KVLayout
from engine.model_config import ModelConfig
from engine.parallel import launch
from engine.parallel.processes import RankProcess
from engine.parallel.split import Split, check_split
from engine.parallel.wire import Done, Failed, FromRank, Refused, Run, frame
from engine.plan import Choices, Plan, make_plan
from engine.step import StepBatch, StepOutput
from engine.vocabulary import Vocabulary, read_vocabulary
from engine.warm_up import RowTime, time_rows, warm_up

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 120.0
"""No step takes this long on devices that work."""
_CULPRIT_S = 0.5
"""When a rank fails because another has died, the other is found dead within this time."""
_POLL_S = 1.0


@dataclass(slots=True)
class _InFlight:
    future: Future[StepOutput]
    answers: dict[int, Done] = field(default_factory=dict)  # by rank


class GroupRunner:
    """`config`, `layout` and `pool` are the whole model's. On CPU the ranks share the pool's memory, so that blocks can
    be handed over as if there was one device; on CUDA each rank holds its share, and the pool maps them."""

    def __init__(
        self, config: ModelConfig, plan: Plan, pool: Pool, ranks: Sequence[RankProcess], step_timeout_s: float
    ) -> None:
        """The ranks have loaded."""
        self.config = config
        self.layout: KVLayout = plan.layout
        self.pool = pool
        self.native = False
        """What the leader itself might compute is not by our own kernels."""
        self.row_times: list[RowTime] = []
        """As a ModelRunner's."""
        self._folder = plan.folder
        self._ranks = ranks
        self._timeout_s = step_timeout_s
        self._numbers = itertools.count()
        self._sending = threading.Lock()  # steps reach every rank in the same order
        self._state = threading.Lock()  # guards what follows
        self._flying: dict[int, _InFlight] = {}
        self._heard = time.monotonic()
        self._failure: InternalError | None = None
        for rank in ranks:
            rank.channel.set_timeout(step_timeout_s)
        self._listener = threading.Thread(target=self._listen, name="group-listener", daemon=True)
        self._listener.start()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tp_size: int,
        pp_size: int,
        threads: int = 1,
        step_timeout_s: float = STEP_TIMEOUT_S,
        **choices: Unpack[Choices],
    ) -> GroupRunner:
        """As ModelRunner.load, over tp_size * pp_size processes on this host, with `threads` cores each. Raises also
        ConfigError for a model that can't be split so."""
        config = ModelConfig.from_folder(path)
        check_split(config, tp_size, pp_size)
        plan = make_plan(path, config, **choices)
        shared = KVPool(plan.layout, plan.num_blocks) if plan.device == "cpu" else None
        ranks: list[RankProcess] = []
        try:
            memory = shared.fd if shared is not None else None
            num_blocks = launch.start(ranks, plan, Split(tp_size, pp_size), memory, threads)
            pool = shared or GroupPool(plan.layout, num_blocks, launch.borrow_caches(ranks))
        except BaseException:
            launch.end(ranks)
            if shared is not None:
                shared.close()
            raise
        return cls(config, plan, pool, ranks, step_timeout_s)

    @property
    def max_steps_in_flight(self) -> int:
        """One for each stage."""
        return self._ranks[0].split.pp_size

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [rank.pid for rank in self._ranks]

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        """Send the step to the ranks. Returns at once, unless a rank is so far behind that its socket is full."""
        future: Future[StepOutput] = Future()
        with self._sending:
            step = next(self._numbers)
            with self._state:
                if self._failure is not None:
                    future.set_exception(self._failure)
                    return future
                if not self._flying:
                    self._heard = time.monotonic()
                self._flying[step] = _InFlight(future)
            data = frame(Run(step, batch))
            for rank in self._ranks:
                try:
                    rank.channel.send_frame(data)
                except (EOFError, OSError) as error:
                    self._fail(f"{rank} takes no step: {error}")
                    break
        return future

    def vocabulary(self) -> Vocabulary:
        """As ModelRunner.vocabulary, in memory of the leader's."""
        return read_vocabulary(self._folder, self.config, self.pool.device, DTYPES[self.layout.dtype])

    def warm_up(self, draft_tokens: int = 0) -> None:
        """As ModelRunner.warm_up."""
        warm_up(self)
        if draft_tokens:
            self.row_times = time_rows(self, 1 + draft_tokens)

    def check_health(self) -> None:
        if self._failure is not None:
            raise self._failure

    def shutdown(self) -> None:
        """End the ranks; steps in flight and later ones fail. The pool is closed by whoever lends it out."""
        self._fail("the runner was shut down; no step can be submitted any more", quiet=True)
        for rank in self._ranks:
            rank.channel.hang_up()
        self._listener.join()
        launch.end(self._ranks)

    # --- the listener's thread -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while self._failure is None:
                for key, _ in selector.select(min(_POLL_S, self._timeout_s / 4)):
                    if self._failure is None:
                        self._hear(key.data)
                self._check_time()

    def _hear(self, rank: RankProcess) -> None:
        try:
            message = rank.channel.receive_from_rank()
        except (EOFError, OSError) as error:
            self._fail(self._killed() or f"{rank} {rank.wait_end(0.0) or f'is not to be heard: {error}'}")
            return
        if isinstance(message, Done):
            self._answered(rank, message)
        else:
            self._fail(self._killed() or f"{rank}: {_told(message)}")

    def _answered(self, rank: RankProcess, done: Done) -> None:
        with self._state:
            self._heard = time.monotonic()
            flying = self._flying.get(done.step)
            if flying is None:
                return
            flying.answers[rank.split.rank] = done
            if len(flying.answers) < len(self._ranks):
                return
            del self._flying[done.step]
        flying.future.set_result(self._joined(flying.answers))

    def _joined(self, answers: dict[int, Done]) -> StepOutput:
        """What the first rank of the last stage drew, and the hidden states that any stage tapped. `seconds` is of the
        rank that took longest: none works on two steps at a time, so that those that overlap hardly count twice."""
        last = next(rank.split for rank in self._ranks if rank.split.last)
        taps = {layer: tap for rank in sorted(answers) for layer, tap in answers[rank].taps.items()}
        return replace(
            answers[last.rank].output(), taps=taps, seconds=max(answer.seconds for answer in answers.values())
        )

    def _check_time(self) -> None:
        with self._state:
            late = [step for step in self._flying if time.monotonic() - self._heard > self._timeout_s]
            silent = [r for r in self._ranks if late and r.split.rank not in self._flying[late[0]].answers]
        if late:
            self._fail(f"{', '.join(map(str, silent))} did not finish a step within {self._timeout_s:g} s")

    # --- the end ---------------------------------------------------------------------------------------------------

    def _killed(self) -> str | None:
        """The rank that was killed, if one was: the others then fail too, and may be heard first."""
        deadline = time.monotonic() + _CULPRIT_S
        while time.monotonic() < deadline:
            for rank in self._ranks:
                end = rank.wait_end(0.01)
                if end is not None and "signal" in end:
                    return f"{rank} {end}"
        return None

    def _fail(self, reason: str, *, quiet: bool = False) -> None:
        with self._state:
            if self._failure is not None:
                return
            self._failure = InternalError(reason)
            lost, self._flying = list(self._flying.values()), {}
        if not quiet:
            logger.error("the group is given up: %s", reason)
            for rank in self._ranks:
                rank.kill()
        for flying in lost:
            flying.future.set_exception(self._failure)


def _told(message: FromRank) -> str:
    return message.message if isinstance(message, Failed | Refused) else f"an answer out of turn: {message}"
