"""A worker process: one engine, both roles over it, and the sessions of the gateways it serves. Knows nothing of Ray.

Engine thread and event loop meet in two places only: commands go down through Engine's queue, reports come up through
`call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from cluster.turns import Turns
from core.errors import InternalError
from core.links import Link, LinkServer
from core.types import Role, TokenDelta
from core.wire import (
    STATUS_PERIOD_S,
    WORKER_SERVICE,
    Abort,
    FromWorker,
    Generate,
    HandoffFailed,
    Opened,
    Prefill,
    Receive,
    SpeculationCounters,
    Step,
    ToWorker,
    WorkerCounters,
    WorkerStatus,
)
from decode_workers.worker import DecodeWorker
from engine.engine import Engine, Report
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from engine.schedule import Chunk
from engine.scheduler import Scheduler, SequenceUpdate
from engine.structured.grammars import Grammars
from kv_transfer.codecs.names import CodecSetting
from kv_transfer.codecs.policy import CodecPolicy
from kv_transfer.giver import Giver
from kv_transfer.messages import SERVICE as TRANSFER_SERVICE
from kv_transfer.messages import ToGiver
from kv_transfer.taker import Taker
from kv_transfer.transports.names import TransportName
from prefill_workers.worker import PrefillWorker
from speculation.in_batch import InBatch
from speculation.in_prefill import InPrefill

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 120.0
"""No step takes this long on a device that works."""
DRAIN_POLL_S = 0.05
FAREWELL_S = 1.0
"""For gateways to take what a worker that stops has told them: the last tokens of what it has just ended."""

Session = Link[ToWorker, FromWorker]


@dataclass(slots=True)
class _Owned:
    """A request and the session that asked for it."""

    session: Session
    prefilling: bool


class MakeSpeculator(Protocol):
    def __call__(self, *, at_work: bool = False) -> InBatch:
        """As speculation.make.make_speculator."""
        ...


class WorkerNode:
    """`await start()` brings it up and returns its address; `await stop()` frees everything it holds."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        runner: ModelRunner | GroupRunner,
        scheduler: Scheduler,
        lease_s: float,
        grammars: Grammars | None = None,
        kv_transport: Literal["auto", TransportName] = "auto",
        kv_codec: CodecSetting = "none",
        make_speculator: MakeSpeculator | None = None,
        make_observer: Callable[[], InPrefill | None] | None = None,
    ) -> None:
        """`make_speculator` is called once it decodes, which a worker that only prefills may never do; until then it
        has what `make_observer` makes."""
        self.worker_id = worker_id
        self.role = role
        self.runner = runner
        self._scheduler = scheduler
        self._make_speculator = make_speculator
        self._speculator = make_speculator() if make_speculator is not None and role is not Role.PREFILL else None
        self._observer = make_observer() if make_observer is not None and self._speculator is None else None
        drafting = self._speculator or self._observer
        self._engine = Engine(runner, scheduler, self._on_report, grammars, self._on_written, drafting)
        if isinstance(runner, ModelRunner):  # of a group's ranks we hear at the end of each step
            runner.kv_sink = self._engine.layer_written
        self._lease_s = lease_s
        self._kv_transport = kv_transport
        self._codecs = CodecPolicy(kv_codec, runner.layout, runner.pool.device)
        self._owned: dict[str, _Owned] = {}
        self._turns = Turns()
        self._leaving = False
        self._sessions: set[Session] = set()
        self._server = LinkServer()
        self._heartbeat: asyncio.Task[None] | None = None
        self._drafting: asyncio.Task[None] | None = None

    async def start(self, host: str) -> str:
        self._loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        only = self._kv_transport if self._kv_transport != "auto" else None
        self._giver = Giver(
            self.runner.pool,
            lease_s=self._lease_s,
            on_released=self._on_released,
            tcp_host=host if only in (None, "tcp") else None,
            nixl=only == "nixl",
            codecs=self._codecs,
        )
        self._taker = Taker(self.runner.pool, transports=(only,) if only is not None else None, codecs=self._codecs)
        self._prefill = PrefillWorker(self._engine, self._giver, self.runner.layout)
        self._decode = DecodeWorker(self._engine, self._taker, self._on_handoff_failed, self._on_settled)
        self._server.add_service(WORKER_SERVICE, ToWorker, self._on_session)  # type: ignore[arg-type]
        self._server.add_service(TRANSFER_SERVICE, ToGiver, self._giver.on_link)  # type: ignore[arg-type]
        self._engine.start()
        self._heartbeat = self._loop.create_task(self._send_status())
        return await self._server.start(host)

    async def stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._drafting is not None:
            self._drafting.cancel()
        self._end_sessions()
        await self._server.farewell(WORKER_SERVICE, FAREWELL_S)
        await self._server.stop()
        await self._decode.close()
        await self._taker.close()
        await self._giver.close()
        await asyncio.to_thread(self._engine.stop)
        self.runner.pool.close()

    def check_health(self) -> None:
        """Raises InternalError when the engine can't serve any more."""
        if not self._engine.alive:
            raise self._engine.failure or InternalError("the engine thread has ended")
        self.runner.check_health()
        if (stuck := self._stuck()) is not None:
            raise InternalError(stuck)
        if self._drafting is not None and self._drafting.done() and not self._drafting.cancelled():
            self._drafting.result()

    def _stuck(self) -> str | None:
        """Why the engine's thread won't come back, if it seems so."""
        for drafting in (self._speculator, self._observer):
            if drafting is not None and (drafter := drafting.lost) is not None:
                return f"drafter {drafter} has not given the engine's thread back; serve without it"
        if (seconds := self._engine.seconds_in_step) > STEP_TIMEOUT_S:
            return f"a step has been running for {seconds:.0f} s"
        return None

    def set_role(self, role: Role, max_num_batched_tokens: int) -> None:
        """Be used for something else from now on, or in steps of another size. What is under way goes on: every worker
        can do either. One that is to decode for the first time does so without drafts until its drafters are made."""
        self.role = role
        self._engine.set_step_tokens(max_num_batched_tokens)
        self._tell_status()
        drafts = self._make_speculator is not None and self._speculator is None and role is not Role.PREFILL
        if drafts and (self._drafting is None or self._drafting.done()):
            self._drafting = self._loop.create_task(self._begin_drafts())

    async def _begin_drafts(self) -> None:
        """On a thread, as weights may take longer to read than a worker may be silent."""
        assert self._make_speculator is not None
        self._speculator = await asyncio.to_thread(partial(self._make_speculator, at_work=True))
        self._engine.speculate(self._speculator)
        self._observer = None

    async def drain(self, within_s: float) -> None:
        """Tell the gateways that this worker leaves, and return once it has nothing to do for them, or nothing would
        come of it, or when the time is over. What is left then, or comes still, they send elsewhere when it stops."""
        self._leaving = True
        self._tell_status()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                # Five places end a request, and none of them is in a hurry.
                while self._owned and self._stuck() is None:  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_POLL_S)

    @property
    def num_owned(self) -> int:
        """Requests that some gateway has under way here."""
        return len(self._owned)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def _on_session(self, session: Session) -> None:
        """For as long as the gateway holds the session and something can be computed here. What was asked over it ends
        with it."""
        if self._broken.done():
            return
        self._sessions.add(session)
        session.send(self.status())
        reading = asyncio.ensure_future(self._read(session))
        try:
            await asyncio.wait({reading, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            self._sessions.discard(session)
            for request_id in [r for r, owned in self._owned.items() if owned.session is session]:
                self._abort(request_id)

    def _end_sessions(self) -> None:
        if not self._broken.done():
            self._broken.set_result(None)

    async def _read(self, session: Session) -> None:
        async for message in session:
            self._handle(session, message)

    def _handle(self, session: Session, message: ToWorker) -> None:
        match message:
            case Generate(request):
                self._owned[request.request_id] = _Owned(session, prefilling=False)
                self._decode.generate(request)
            case Prefill(request):
                self._owned[request.request_id] = _Owned(session, prefilling=True)
                self._prefill.prefill(message, deferred=self._turns.prompt(request.request_id))
            case Receive(request):
                self._owned[request.request_id] = _Owned(session, prefilling=False)
                self._turns.reserve(request.request_id)
                self._decode.receive(message)
            case Opened(request_id):
                self._decode.opened(request_id)
            case Abort(request_id):
                self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        owned = self._owned.pop(request_id, None)
        if owned is None:
            return
        if owned.prefilling:
            self._prefill.abort(request_id)
        else:
            self._decode.abort(request_id)

    # --- what the engine and the transfers report --------------------------------------------------------------------

    def _on_report(self, report: Report) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._deliver, report)

    def _on_written(self, chunks: list[Chunk], layer: int) -> None:
        """On the engine's thread, once for every layer."""
        if notes := self._prefill.notes(chunks, layer):
            self._loop.call_soon_threadsafe(self._prefill.written, notes, self._giver.written_by_now())

    def _deliver(self, report: Report) -> None:
        for opened in report.opened:
            self._prefill.opened(opened)
            if (owner := self._owned.get(opened.sequence.request_id)) is not None:
                owner.session.send(Opened(opened.sequence.request_id))
        owned = [(self._owned.get(update.sequence.request_id), update) for update in report.updates]
        live = [(owner, update) for owner, update in owned if owner is not None]  # others were aborted meanwhile
        outgoing: dict[Session, list[TokenDelta]] = {}
        for owner, update in live:
            outgoing.setdefault(owner.session, []).append(to_delta(update))
        for session, deltas in outgoing.items():
            session.send(Step(deltas))  # before the giver is told: sealing would keep a first token waiting
        self._prefill.computed(report.computed)
        for owner, update in live:
            self._advance(owner, update)
        for sequence in report.granted:
            self._decode.granted(sequence)
        if self._engine.failure is not None:
            self._end_sessions()  # so that gateways go elsewhere at once

    def _advance(self, owned: _Owned, update: SequenceUpdate) -> None:
        request_id = update.sequence.request_id
        if owned.prefilling:
            self._prefill.on_update(update)
        if update.finish is not None:
            self._owned.pop(request_id, None)
            if not owned.prefilling:
                self._decode.rejected(request_id)

    def _on_released(self, transfer_id: str, outcome: str) -> None:
        request_id = self._prefill.released(transfer_id)
        if request_id is not None:
            self._owned.pop(request_id, None)
        if outcome != "committed":
            logger.info("transfer %s ended without commit: %s", transfer_id, outcome)

    def _on_settled(self, request_id: str) -> None:
        for prompt in self._turns.settle(request_id):
            self._prefill.undefer(prompt)

    def _on_handoff_failed(self, request_id: str, reason: str) -> None:
        logger.warning("hand-off of %s failed: %s", request_id, reason)
        if (owned := self._owned.pop(request_id, None)) is not None:
            owned.session.send(HandoffFailed(request_id, reason))

    # --- status ----------------------------------------------------------------------------------------------------

    async def _send_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            self._tell_status()

    def _tell_status(self) -> None:
        status = self.status()
        for session in self._sessions:
            session.send(status)

    def status(self) -> WorkerStatus:
        stats, giver, taker = self._engine.stats, self._giver.counters, self._taker.counters
        return WorkerStatus(
            worker_id=self.worker_id,
            role=self.role,
            leaving=self._leaving,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            num_free_blocks=stats.num_free_blocks,
            num_blocks=self.runner.pool.num_blocks,
            block_size=self.runner.layout.block_size,
            max_num_seqs=self._scheduler.config.max_num_seqs,
            counters=WorkerCounters(
                prompt_tokens=stats.prompt_tokens,
                generated_tokens=stats.generated_tokens,
                prefix_cache_queries=stats.prefix_cache_queries,
                prefix_cache_hits=stats.prefix_cache_hits,
                preemptions=stats.num_preemptions,
                steps=stats.steps,
                step_tokens=stats.step_tokens,
                step_seconds=stats.step_seconds,
                transfers_committed=taker.committed,
                transfers_failed=taker.failed,
                transfers_expired=taker.expired,
                transfers_aborted=taker.aborted,
                offers_committed=giver.committed,
                offers_failed=giver.failed,
                offers_expired=giver.expired,
                offers_aborted=giver.aborted,
                transport_fallbacks=taker.fallbacks,
                transfer_bytes=taker.bytes,
                transfer_wire_bytes=dict(taker.wire_bytes),
                transfer_seconds=taker.seconds,
                transfer_wait_seconds=taker.wait_seconds,
                transfer_wire_seconds=taker.wire_seconds,
                transfer_overlap_seconds=taker.overlap_seconds,
                transfer_encode_seconds=giver.encode_seconds,
                transfer_decode_seconds=taker.decode_seconds,
                speculation=self._speculation(),
            ),
        )

    def _speculation(self) -> SpeculationCounters | None:
        """Of drafters that only see prompts here there is nothing to tell unless one has failed."""
        if self._speculator is not None:
            return self._speculator.counters.snapshot()
        if self._observer is not None and self._observer.counters.switched_off:
            return self._observer.counters.snapshot()
        return None


def to_delta(update: SequenceUpdate) -> TokenDelta:
    return TokenDelta(
        request_id=update.sequence.request_id,
        index=update.index,
        token_ids=list(update.token_ids),
        logprobs=update.logprobs,
        prompt_logprobs=update.prompt_logprobs,
        num_cached_tokens=update.num_cached_tokens,
        num_drafted_tokens=update.num_drafted_tokens,
        num_accepted_tokens=update.num_accepted_tokens,
        inexact_kv=update.sequence.inexact_kv,
        finish=update.finish,
    )
