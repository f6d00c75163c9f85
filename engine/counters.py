"""What an engine has done and has still to do, in numbers that any thread may ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.scheduler import Scheduler, SequenceUpdate


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot taken between two turns of the loop. Counters are monotonic since start, `taken` ones among them: of
    what was added or reserved, what the snapshot knows, in sequences and in tokens to compute."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Computed by these steps, of prompts and outputs."""
    step_seconds: float = 0.0
    num_taken: int = 0
    num_taken_tokens: int = 0


class Counters:
    """`given` may be called from any thread, `stats` read by any; all else is for the thread of the loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._prompt_tokens = self._generated_tokens = self._steps = self._step_tokens = 0
        self._step_seconds = 0.0
        self._giving = threading.Lock()
        self._num_given = self._num_given_tokens = self._num_taken = self._num_taken_tokens = 0
        self.snapshot()

    @property
    def stats(self) -> EngineStats:
        """As the last snapshot has it, with what was given since among what waits."""
        stats = self._stats
        return replace(
            stats,
            num_waiting=stats.num_waiting + self._num_given - stats.num_taken,
            num_waiting_tokens=stats.num_waiting_tokens + self._num_given_tokens - stats.num_taken_tokens,
        )

    def given(self, num_tokens: int) -> None:
        """A sequence with so many tokens to compute is on its way to the loop."""
        with self._giving:
            self._num_given += 1
            self._num_given_tokens += num_tokens

    def taken(self, num_tokens: int) -> None:
        """It has come there."""
        self._num_taken += 1
        self._num_taken_tokens += num_tokens

    def stepped(self, num_tokens: int, seconds: float, updates: Iterable[SequenceUpdate]) -> None:
        """A step is over that computed so many tokens and brought these."""
        self._steps += 1
        self._step_tokens += num_tokens
        self._step_seconds += seconds
        for update in updates:
            self._generated_tokens += len(update.token_ids)
            if update.index == len(update.sequence.request.emitted_token_ids):
                self._prompt_tokens += update.sequence.num_prompt_tokens

    def snapshot(self) -> None:
        """Between two turns of the loop."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        self._stats = EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=blocks.num_free,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=blocks.num_queried_tokens,
            prefix_cache_hits=blocks.num_hit_tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            step_seconds=self._step_seconds,
            num_taken=self._num_taken,
            num_taken_tokens=self._num_taken_tokens,
        )
