"""The drafters of a worker, which may fail and may never come back, and the requests that they know of.

They work on a thread of their own, unless they need none. One that raises, proposes what is no tree or is not done in
time is switched off for this worker: it is counted, said in the log, and requests go on without it. Who works on the
engine's thread is switched off after it took too long; if it never comes back, it is `lost`, and the worker with it.
How long a drafter may take depends on the steps that it is to make faster, and is far more than any use of it: who is
only slow is the controller's to judge.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from core.draft_state import MAX_STATE_BYTES, DraftState, DraftStates
from core.errors import TransferError
from engine.sequence import Sequence as EngineSequence
from speculation.aside import Aside, Stalled
from speculation.packing import packed, unpacked
from speculation.protocols import Drafter
from speculation.rounds import DraftRequest
from speculation.seen import Step, observed, observed_in_turn

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 1.0
"""A drafter has at least so long, so that a machine that is busy with something else is not held against it."""
PATIENCE_STEPS = 20
"""And as long as so many steps."""
LOST_S = 15.0
"""And so long, at least, before the engine's thread is given up with it. By the wall: it may wait for something."""
_FADING = 0.9
"""Of the mean time of a step, with each further one."""


class Crew:
    """Used on the engine's thread only. A drafter is called with plain data, arrays that nobody changes any more, and
    requests, of which it reads; so one that was given up and comes back late has nothing to spoil."""

    def __init__(
        self, drafters: Mapping[str, Drafter], switched_off: dict[str, str], patience_s: float = PATIENCE_S
    ) -> None:
        """`switched_off` is where it is written down who was, and why."""
        self._drafters = dict(drafters)
        self._switched_off = switched_off
        self._least_s = patience_s
        self._step_s = 0.0
        self._aside = Aside("drafters")
        self._at_work: tuple[str, float] | None = None  # who is on the engine's thread, and when it will be lost
        self._keys = itertools.count()
        self._requests: dict[EngineSequence, DraftRequest] = {}

    # --- drafters --------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return name in self._drafters

    def __getitem__(self, name: str) -> Drafter:
        return self._drafters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._drafters))

    def __len__(self) -> int:
        return len(self._drafters)

    def taps(self, *, soon: bool) -> tuple[int, ...]:
        """Layers that one of them wants to see of a step. `soon`: whether it may be asked for drafts right after."""
        needs = (drafter.needs for drafter in self._drafters.values())
        return tuple(sorted({tap for each in needs if soon or not each.only_latest for tap in each.taps}))

    @property
    def reads_top(self) -> int:
        """How many of the likeliest tokens of a row the one that wants most of them does."""
        return max((drafter.needs.top for drafter in self._drafters.values()), default=0)

    @property
    def lost(self) -> str | None:
        """The drafter that has kept the engine's thread for so long that it will hardly give it back. From any thread;
        one that a standstill of the machine was taken for is not named any more once it goes on."""
        at_work = self._at_work
        return at_work[0] if at_work is not None and time.monotonic() > at_work[1] else None

    def step_took(self, seconds: float) -> None:
        self._step_s = _FADING * self._step_s + (1 - _FADING) * seconds if self._step_s else seconds

    def call(self, name: str, work: Callable[[], T]) -> T | None:
        """What a drafter gives, or None and no such drafter any more."""
        if name not in self._drafters:  # it was switched off since this was thought of
            return None
        patience = max(self._least_s, PATIENCE_STEPS * self._step_s)
        try:
            if self._drafters[name].needs.thread:
                return self._aside.run(work, patience)
            self._at_work = name, time.monotonic() + max(LOST_S, patience)
            started = time.thread_time()  # a process that stands still is not the drafter's fault
            made = work()
            if (took := time.thread_time() - started) > patience:
                self._switch_off(name, f"it took {took:.1f} s, and may take {patience:.1f}")
            return made
        except Stalled:
            self._switch_off(name, f"it was not done after {patience:.1f} s")
        except Exception as error:  # noqa: BLE001 - a drafter may be anybody's code, and no request depends on it
            self._switch_off(name, f"it raised {type(error).__name__}: {error}", error)
        finally:
            self._at_work = None
        return None

    def _switch_off(self, name: str, reason: str, error: Exception | None = None) -> None:
        if self._drafters.pop(name, None) is not None:
            switch_off(name, reason, self._switched_off, error)

    # --- requests --------------------------------------------------------------------------------------------------

    def request(self, sequence: EngineSequence) -> DraftRequest:
        """As drafters see it. They are told of one that goes on here, the first time that it is asked for."""
        known = self._requests.get(sequence)
        if known is not None:
            return known
        request = sequence.request
        known = self._requests[sequence] = DraftRequest(
            key=next(self._keys),
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            seed=request.sampling.seed,
            temperature=request.sampling.temperature,
            scope=f"{request.cache_salt}\0{request.adapter}",
            remember=request.remember,
        )
        if not sequence.hold_after_prefill:
            for name in self:
                self.call(name, partial(self[name].start, known))
        return known

    def requests(self, sequences: Sequence[EngineSequence]) -> list[DraftRequest]:
        return [self.request(sequence) for sequence in sequences]

    def forget(self, sequence: EngineSequence) -> None:
        request = self._requests.pop(sequence, None)
        if request is not None:
            for name in self:
                self.call(name, partial(self[name].finish, request.key))

    def absorbing(
        self, name: str, step: Step, own: Collection[int] = (), *, held_only: bool = False
    ) -> Callable[[], None] | None:
        """For `call`: the drafter sees the rows that it needs of all sequences but the candidates `own`, or of those
        that are handed over only."""
        drafter = self[name]
        if not (drafter.needs.taps or drafter.needs.top):
            return None
        rows = step.rows_beside(own, all_rows=drafter.needs.all_rows, held_only=held_only)
        if rows is None:
            return None
        return partial(drafter.absorb, self.requests(rows.sequences), observed(step, drafter.needs, *rows.places))

    def absorbing_all(self, name: str, steps: Sequence[Step]) -> Callable[[], None]:
        """`absorbing` of plain steps of the same sequences, one after the other, at once."""
        needs = self[name].needs
        sequences, seen = observed_in_turn(steps if needs.all_rows else steps[-1:], needs)
        return partial(self[name].absorb, self.requests(sequences), seen)

    # --- hand-off --------------------------------------------------------------------------------------------------

    def pack(self, sequence: EngineSequence) -> DraftStates:
        """What drafters on another worker need to go on with it as those here would."""
        states: DraftStates = {}
        request = self._requests.get(sequence)
        if request is None:
            return states
        left = MAX_STATE_BYTES
        for name in self:
            state = self.call(name, partial(_packed, self[name], request.key))
            if state is None or not state.tensors:
                continue
            if state.nbytes > left:
                logger.warning("drafter %s: %d bytes about a prompt are too many to hand over", name, state.nbytes)
                continue
            left -= state.nbytes
            states[name] = state
        return states

    def unpack(self, sequence: EngineSequence, states: DraftStates) -> None:
        """`pack` of another worker. What does not fit is left aside: it is the other worker's word."""
        request = self.request(sequence)
        for name, state in states.items():
            if name in self and state.version == self[name].version:
                self._unpack(name, request, state)

    def _unpack(self, name: str, request: DraftRequest, state: DraftState) -> None:
        drafter = self[name]

        def unpack() -> TransferError | None:
            try:
                drafter.unpack(request, unpacked(state))
            except TransferError as error:
                return error
            return None

        if (error := self.call(name, unpack)) is not None:
            logger.warning("drafter %s starts without what it was handed over: %s", name, error.message)


def switch_off(name: str, reason: str, switched_off: dict[str, str], error: Exception | None = None) -> None:
    """Write it down there and say it."""
    switched_off[name] = reason
    logger.error("drafter %s is switched off on this worker: %s", name, reason, exc_info=error)


def _packed(drafter: Drafter, key: int) -> DraftState:
    return packed(drafter.version, drafter.pack(key))
