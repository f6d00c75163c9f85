"""The gateway's side of the cluster: a session to every worker, and a dispatch for every request.

Implements gateway.backend.Backend. All of it runs on one event loop; the deciders (router, dispatch) say what to do and
this carries it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from cluster.dispatch import Deliver, Dispatch, Instruction, Reroute, Send
from cluster.membership import Member
from cluster.recorder import REPORT_PERIOD_S, Record, Recorder, Report, SendReport
from cluster.router import Candidate
from cluster.routes import Routes, Way
from core.errors import InternalError, SlipstreamError, Unavailable
from core.links import Link, LinkClient
from core.replan_metrics import ReplanStatus
from core.types import FinishReason, Request, TokenDelta
from core.wire import (
    STATUS_PERIOD_S,
    STATUS_TIMEOUT_S,
    WORKER_SERVICE,
    FromWorker,
    HandoffFailed,
    Opened,
    Step,
    ToWorker,
    WorkerStatus,
)
from gateway.backend import BackendStatus

logger = logging.getLogger(__name__)

ListMembers = Callable[[], Awaitable[Iterable[Member]]]
MEMBERS_PERIOD_S = 0.5


class WorkerSession:
    """One worker as this gateway knows it. Owns the channel and the link."""

    def __init__(self, member: Member, client: LinkClient, link: Link[FromWorker, ToWorker]) -> None:
        self.member = member
        self.link = link
        self.status: WorkerStatus | None = None
        self.last_heard = time.monotonic()
        self._client = client
        self._assigned_tokens = 0
        self._assigned_requests = 0
        self._ended_requests = 0
        self._in_flight = 0

    @classmethod
    async def open(cls, member: Member) -> WorkerSession:
        """Raises Unavailable if the worker does not answer."""
        client = LinkClient(member.address)
        try:
            link: Link[FromWorker, ToWorker] = await client.open(WORKER_SERVICE, FromWorker, ToWorker)  # type: ignore[arg-type]
        except Unavailable:
            await client.close()
            raise
        return cls(member, client, link)

    def heard(self, status: WorkerStatus) -> None:
        self.status = status
        self._assigned_tokens = self._assigned_requests = self._ended_requests = 0

    def assign(self, tokens: int, *, decodes: bool) -> None:
        """A request. One that `decodes` here is here until it is `released`."""
        self._assigned_tokens += tokens
        self._assigned_requests += 1
        self._in_flight += decodes

    def release(self) -> None:
        self._ended_requests += 1
        self._in_flight -= 1

    def candidate(self) -> Candidate | None:
        """None until the worker has said how it is."""
        if self.status is None:
            return None
        return Candidate(
            self.member.worker_id,
            self.member.address,
            self.status,
            self._assigned_tokens,
            self._assigned_requests,
            self._ended_requests,
            self._in_flight,
            self.member.node,
        )

    async def close(self) -> None:
        self.link.close()
        await self._client.close()


class Flight:
    """A request under way: its dispatch and the queue its consumer reads."""

    def __init__(self, request: Request, way: Way, record: Record) -> None:
        self.dispatch = Dispatch(request)
        self.way = way
        self.record = record
        self.queue: asyncio.Queue[TokenDelta] = asyncio.Queue()
        self.attempt_id: str | None = None
        """The attempt whose deltas are routed here."""
        self.decode: WorkerSession | None = None
        """Of the worker that this attempt decodes at."""


class ClusterBackend:
    """`await start()` connects; `await stop()` closes every session, which ends what the workers still do for us."""

    def __init__(
        self,
        list_members: ListMembers,
        *,
        routes: Routes,
        expected_workers: int = 1,
        report: SendReport | None = None,
    ) -> None:
        """`report` is called every REPORT_PERIOD_S with what has ended."""
        self._gateway_id = uuid.uuid4().hex
        self._report = report
        self._recorder = Recorder()
        self._replanning: ReplanStatus | None = None
        self._list_members = list_members
        self._routes = routes
        self._expected_workers = expected_workers
        self._sessions: dict[str, WorkerSession] = {}
        self._attempts: dict[str, Flight] = {}
        self._connecting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._complete_once = False
        self._news = asyncio.Event()

    async def start(self) -> None:
        self._spawn(self._follow_members())
        self._spawn(self._watch_heartbeats())
        if self._report is not None:
            self._spawn(self._send_reports(self._report))

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in list(self._sessions.values()):
            await session.close()
        self._sessions.clear()

    # --- Backend ---------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, FinishReason | None]:
        """See gateway.backend.Backend."""
        flight = Flight(request, self._routes.way(request), self._recorder.begin(request))
        timer = asyncio.get_running_loop().call_later(
            max(0.0, request.deadline - time.time()), lambda: self._carry_out(flight, flight.dispatch.on_deadline())
        )
        try:
            self._route(flight, None, refuse=False)
            while True:
                delta = await flight.queue.get()
                enough = yield delta
                if enough is not None:
                    flight.record.end(enough)
                if enough is not None or delta.finish is not None:
                    return
        except SlipstreamError:
            flight.record.end(FinishReason.ERROR)
            raise
        finally:
            timer.cancel()
            self._carry_out(flight, flight.dispatch.on_cancel())

    def status(self) -> BackendStatus:
        workers = tuple(s.status for s in self._sessions.values() if s.status is not None)
        self._complete_once = self._complete_once or len(workers) >= self._expected_workers
        reason = ""
        if not workers:
            reason = "no worker is alive"
        elif not self._complete_once:
            reason = f"{len(workers)} of {self._expected_workers} workers are up"
        return BackendStatus(
            ready=not reason,
            reason=reason,
            workers=workers,
            routes=self._routes.counts,
            replanning=self._replanning,
        )

    def check_health(self) -> None:
        """Raises InternalError when something that should always run has failed."""
        if self._failure is not None:
            raise InternalError(f"the gateway no longer follows its workers: {self._failure}")

    async def wait_alive(self, seconds: float) -> None:
        """Return once a worker has said how it is, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.status().workers:
                    self._news.clear()
                    await self._news.wait()

    async def wait_ready(self) -> None:
        """Return once a request would be served."""
        while not self.status().ready:
            self._news.clear()
            await self._news.wait()

    # --- requests --------------------------------------------------------------------------------------------------

    def _route(self, flight: Flight, local_to: str | None, refuse: bool = True) -> None:
        """Start the next attempt. Without a route the request ends (`refuse`) or the error is raised."""
        self._forget(flight)  # first, or the attempt before would count where it was
        candidates = [c for s in self._sessions.values() if (c := s.candidate()) is not None]
        try:
            route = self._routes.choose(flight.way, flight.dispatch, candidates, local_to)
        except SlipstreamError as error:
            if not refuse:
                raise
            self._carry_out(flight, flight.dispatch.refuse(error))
            return
        for worker in route.workers:
            session = self._sessions[worker.worker_id]
            session.assign(len(flight.dispatch.request.prompt_token_ids), decodes=worker is route.decode)
        flight.decode = self._sessions[route.decode.worker_id]
        prefill = route.prefill
        started = flight.dispatch.start(
            route.decode.worker_id,
            prefill.worker_id if prefill else None,
            prefill.address if prefill else "",
            within_s=flight.dispatch.request.deadline - time.time(),
        )
        flight.attempt_id = flight.dispatch.attempt_id
        if flight.attempt_id is not None:
            self._attempts[flight.attempt_id] = flight
        self._carry_out(flight, started)

    def _carry_out(self, flight: Flight, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(worker_id, message):
                    if (session := self._sessions.get(worker_id)) is not None:
                        session.link.send(message)
                case Deliver(delta):
                    flight.record.heard(delta)
                    flight.queue.put_nowait(delta)
                    self._routes.delivered(flight.way, flight.dispatch, delta)
                case Reroute(local_to):
                    self._route(flight, local_to)
        if flight.dispatch.ended:
            self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        if flight.attempt_id is not None:
            self._attempts.pop(flight.attempt_id, None)
            flight.attempt_id = None
        if flight.decode is not None:
            flight.decode.release()
            flight.decode = None

    # --- workers ---------------------------------------------------------------------------------------------------

    async def _follow_members(self) -> None:
        while True:
            for member in await self._list_members():
                if member.worker_id not in self._sessions and member.worker_id not in self._connecting:
                    self._connecting.add(member.worker_id)
                    self._spawn(self._connect(member))
            await asyncio.sleep(MEMBERS_PERIOD_S)

    async def _connect(self, member: Member) -> None:
        try:
            session = await WorkerSession.open(member)
        except Unavailable as error:
            logger.warning("worker %s: %s", member.worker_id, error.message)
            return
        finally:
            self._connecting.discard(member.worker_id)
        self._sessions[member.worker_id] = session
        self._spawn(self._listen(session))

    async def _listen(self, session: WorkerSession) -> None:
        """Until the link ends; unless it is we who end it, its requests then go elsewhere."""
        try:
            async for message in session.link:
                session.last_heard = time.monotonic()
                self._hear(session, message)
        except InternalError as error:
            logger.error("worker %s: %s", session.member.worker_id, error.message)
        finally:
            self._sessions.pop(session.member.worker_id, None)
        self._lose(session.member.worker_id, left=session.status is not None and session.status.leaving)
        await session.close()

    def _hear(self, session: WorkerSession, message: FromWorker) -> None:
        match message:
            case Step(deltas):
                for delta in deltas:
                    if (flight := self._attempts.get(delta.request_id)) is not None:
                        self._carry_out(flight, flight.dispatch.on_delta(delta, session.member.worker_id))
            case Opened(request_id):
                if (flight := self._attempts.get(request_id)) is not None:
                    self._carry_out(flight, flight.dispatch.on_opened(request_id))
            case HandoffFailed(request_id):
                if (flight := self._attempts.get(request_id)) is not None:
                    self._carry_out(flight, flight.dispatch.on_handoff_failed(request_id))
            case WorkerStatus():
                session.heard(message)
                self._routes.heard(message)
                self._news.set()

    def _lose(self, worker_id: str, *, left: bool) -> None:
        logger.log(logging.INFO if left else logging.WARNING, "worker %s is gone", worker_id)
        self._routes.lost(worker_id)
        for flight in list(self._attempts.values()):
            self._carry_out(flight, flight.dispatch.on_worker_lost(worker_id, left=left))

    async def _watch_heartbeats(self) -> None:
        woken = time.monotonic()
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            late, woken = time.monotonic() - woken - STATUS_PERIOD_S, time.monotonic()
            for session in list(self._sessions.values()):
                # While this loop stood still it could not hear: that is not the worker's silence.
                session.last_heard += late
                if woken - session.last_heard > STATUS_TIMEOUT_S:
                    logger.warning("worker %s has been silent for %g s", session.member.worker_id, STATUS_TIMEOUT_S)
                    session.link.close()
                    await session.close()

    async def _send_reports(self, report: SendReport) -> None:
        while True:
            await asyncio.sleep(REPORT_PERIOD_S)
            served = self._recorder.take()
            try:
                self._replanning = await report(
                    Report(
                        gateway_id=self._gateway_id,
                        served=served,
                        in_flight=self._recorder.in_flight,
                        workers=list(self.status().workers),
                        under_way=self._recorder.under_way(),
                    )
                )
            except Unavailable as error:
                logger.warning("the controller takes no report, trying again: %s", error.message)
                self._recorder.keep(served)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("background task of the gateway failed", exc_info=error)
            self._failure = error
