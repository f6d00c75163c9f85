"""A world of one giver, one taker and a bad network between them, small enough to visit every state of.

Messages may be lost, doubled and overtaken; either side may die, the link may break, owners may cancel and withdraw,
transports may fail, and time may pass, in any order. `check` holds in every state; `wind_down` lets nothing more go
wrong except that nobody hears anybody, and then everything must end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from kv_transfer import states
from kv_transfer.states import GiverTransfer, Outcome, Phase, Release, TakerTransfer

LEASE, STALL, DEADLINE, PIECES = 4.0, 3.0, 9.0, 2


def new_giver() -> GiverTransfer:
    return GiverTransfer(LEASE)


def new_taker() -> TakerTransfer:
    return TakerTransfer(LEASE, STALL, DEADLINE)


@dataclass
class World:
    giver: GiverTransfer = field(default_factory=new_giver)
    taker: TakerTransfer = field(default_factory=new_taker)
    now: float = 0.0
    to_giver: tuple[states.Event, ...] = ()
    to_taker: tuple[states.Event, ...] = ()
    giver_alive: bool = True
    taker_alive: bool = True
    linked: bool = True
    sealing: bool = False
    reads: int = 0
    pulling: bool = False
    reserved: bool = False
    began: bool = False
    stopping: bool = False
    arrived: frozenset[int] = frozenset()
    offered: bool = False
    giver_released: tuple[Outcome, ...] = ()
    taker_released: tuple[Outcome, ...] = ()
    spent: frozenset[str] = frozenset()
    """Faults and decisions that happen at most once in a run."""

    def key(self) -> tuple[object, ...]:
        return (_TAKER(self.taker), frozenset(self.taker.verified), _GIVER(self.giver), _WORLD(self))

    @property
    def wake_at(self) -> float:
        wakes = [self.giver.wake_at] * self.giver_alive + [self.taker.wake_at] * self.taker_alive
        return min(wakes, default=math.inf)

    # --- what can happen -----------------------------------------------------------------------------------------

    def moves(self) -> Iterator[tuple[str, World]]:
        yield from self._deliveries()
        yield from self._owners()
        yield from self._threads()
        yield from self._disasters()
        if self.wake_at < math.inf:
            yield self._do("time passes", World.tick)

    def _deliveries(self) -> Iterator[tuple[str, World]]:
        for box in ("to_giver", "to_taker"):
            for index, message in enumerate(getattr(self, box)):
                yield self._do(f"{message} arrives", World.deliver, box, index)
                yield from self._once(f"lose in {box}", World.lose, box, index)
                yield from self._once(f"double in {box}", World.double, box, index)

    def _owners(self) -> Iterator[tuple[str, World]]:
        if self.taker_alive and self.taker.phase is Phase.NEW:
            yield self._do("expect", World.feed_taker, states.Expect())
        if self.taker_alive and self.taker.phase in (Phase.NEW, Phase.EXPECTING):
            yield self._do("begin", World.begin)
        if self.giver_alive and not self.offered:
            yield self._do("offer", World.offer)
        if self.giver_alive:
            yield from self._once("withdraw", World.feed_giver, states.Withdraw("withdrawn"))
            yield from self._once("finish", World.feed_giver, states.Withdraw("finished", finished=True))
            yield from self._once("shut down", World.feed_giver, states.Withdraw("stopping", Outcome.FAILED))
        if self.taker_alive and self.taker.phase is not Phase.NEW:
            yield from self._once("cancel", World.feed_taker, states.CancelRequested())

    def _threads(self) -> Iterator[tuple[str, World]]:
        if self.sealing:
            yield self._do("sealed", World.sealed, None)
            yield from self._once("seal fails", World.sealed, "no memory")
        if self.giver_alive and self.giver.may_read and not self.reads:
            yield from self._once("read", World.read)
        if self.reads:
            yield self._do("read ends", World.read_ends)
        if self.pulling and self.taker_alive:
            if not self.began:
                yield self._do("pull begins", World.begin_pull)
            for index in set(range(PIECES)) - self.arrived if self.began else ():
                yield self._do(f"piece {index}", World.arrive, index)
            if self.arrived == frozenset(range(PIECES)):
                yield self._do("pull ends", World.pull_ends, None)
            if self.stopping:
                yield self._do("pull stops", World.pull_ends, "stopped")
            yield from self._once("pull fails", World.pull_ends, "bad checksum")
            yield from self._once("pull ends short", World.pull_ends, None)

    def _disasters(self) -> Iterator[tuple[str, World]]:
        if self.linked:
            yield from self._once("link breaks", World.break_link)
        if self.giver_alive:
            yield from self._once("giver dies", World.kill_giver)
        if self.taker_alive:
            yield from self._once("taker dies", World.kill_taker)

    def _do(self, name: str, move: Any, *arguments: Any) -> tuple[str, World]:
        after = copy.copy(self)
        after.giver, after.taker = copy.copy(self.giver), copy.copy(self.taker)
        after.taker.verified = set(self.taker.verified)
        move(after, *arguments)
        return name, after

    def _once(self, name: str, move: Any, *arguments: Any) -> Iterator[tuple[str, World]]:
        if name not in self.spent:
            _, after = self._do(name, move, *arguments)
            after.spent |= {name}
            yield name, after

    # --- moves -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        self.now = max(self.now, self.wake_at)
        if self.giver_alive:
            self.feed_giver(states.Tick())
        if self.taker_alive:
            self.feed_taker(states.Tick())

    def deliver(self, box: str, index: int) -> None:
        message = getattr(self, box)[index]
        self.lose(box, index)
        if box == "to_giver" and self.giver_alive:
            self.feed_giver(message)
        elif box == "to_taker" and self.taker_alive:
            self.feed_taker(message)

    def lose(self, box: str, index: int) -> None:
        messages = getattr(self, box)
        setattr(self, box, messages[:index] + messages[index + 1 :])

    def double(self, box: str, index: int) -> None:
        self._send(box, getattr(self, box)[index])

    def offer(self) -> None:
        self.offered = True
        self.feed_giver(states.Offered())

    def begin(self) -> None:
        self.reserved = True
        self.feed_taker(states.Begin())

    def sealed(self, error: str | None) -> None:
        self.sealing = False
        self.feed_giver(states.Prepared(error))

    def read(self) -> None:
        self.reads += 1
        self.feed_giver(states.ReadStarted())

    def read_ends(self) -> None:
        self.reads -= 1
        self.feed_giver(states.ReadEnded())

    def begin_pull(self) -> None:
        self.began = True
        self.feed_taker(states.PullBegan())

    def arrive(self, index: int) -> None:
        self.arrived |= {index}
        self.feed_taker(states.PieceVerified(index))

    def pull_ends(self, error: str | None) -> None:
        self.pulling = self.stopping = False
        self.feed_taker(states.PullEnded(error))

    def break_link(self) -> None:
        """What is on the way may still arrive; nothing sent later does."""
        self.linked = False
        if self.giver_alive:
            self.feed_giver(states.LinkLost("cut"))
        if self.taker_alive:
            self.feed_taker(states.LinkLost("cut"))

    def kill_giver(self) -> None:
        self.giver_alive = self.sealing = False
        self.reads = 0
        if self.linked and self.taker_alive and self.taker.phase is not Phase.NEW:
            self.feed_taker(states.LinkLost("giver died"))
        self.linked = False

    def kill_taker(self) -> None:
        self.taker_alive = self.pulling = self.stopping = False
        if self.linked and self.giver_alive:
            self.feed_giver(states.LinkLost("taker died"))
        self.linked = False

    # --- machines ----------------------------------------------------------------------------------------------------

    def feed_giver(self, event: states.Event) -> None:
        for instruction in self.giver.handle(event, self.now):
            match instruction:
                case states.Prepare():
                    assert not self.sealing
                    self.sealing = True
                case states.SendOffer():
                    self._send("to_taker", states.OfferReceived(PIECES))
                case states.SendRenewed(sent_at):
                    self._send("to_taker", states.Renewal(sent_at))
                case states.SendWithdrawn(reason, outcome, finished):
                    self._send("to_taker", states.Withdraw(reason, outcome, finished))
                case Release(outcome):
                    self.giver_released += (outcome,)

    def feed_taker(self, event: states.Event) -> None:
        for instruction in self.taker.handle(event, self.now):
            match instruction:
                case states.SendExpect():
                    self._send("to_giver", states.Expected())
                case states.SendWant():
                    self._send("to_giver", states.Wanted(0))
                case states.SendRenew(sent_at):
                    self._send("to_giver", states.Renewal(sent_at))
                case states.SendCommitted():
                    self._send("to_giver", states.CommitReceived())
                case states.SendCancel(reason):
                    self._send("to_giver", states.CancelReceived(reason))
                case states.StartPull():
                    assert not self.pulling
                    self.pulling = True
                case states.StopPull():
                    self.stopping = True
                case Release(outcome):
                    self.taker_released += (outcome,)

    def _send(self, box: str, message: states.Event) -> None:
        if self.linked:
            setattr(self, box, tuple(sorted((*getattr(self, box), message), key=repr)))

    # --- laws --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        assert len(self.giver_released) <= 1, "the giver's blocks were freed twice"
        assert len(self.taker_released) <= 1, "the taker's blocks were freed twice"
        assert not self.giver_released or self.offered, "blocks were freed that were never given"
        assert not self.taker_released or self.reserved, "blocks were freed that were never reserved"
        assert not self.taker.finished or "finish" in self.spent, "the taker believes in a finish that was not"
        assert not self.giver_released or not (self.sealing or self.reads), "freed under a reader"
        assert not self.taker_released or not self.pulling, "freed under a transport"
        if self.taker_released == (Outcome.COMMITTED,):
            assert self.arrived == frozenset(range(PIECES)), "committed from pieces that were not verified"
        if self.giver.outcome is Outcome.COMMITTED:
            assert self.taker_released == (Outcome.COMMITTED,), "the giver believes in a commit that was not"
        if self.taker.phase is self.giver.phase is Phase.TRANSFERRING and self.giver_alive and self.taker_alive:
            assert self.taker.lease_until <= self.giver.lease_until, "the giver's lease ends first"
        if self.giver.phase is Phase.RELEASED and self.offered:
            assert self.giver_released, "the giver's blocks leaked"
        if self.taker.phase is Phase.RELEASED and self.reserved:
            assert self.taker_released, "the taker's blocks leaked"

    def wind_down(self) -> None:
        """Nobody hears anybody any more; threads end, time passes."""
        world = self._do("", lambda _: None)[1]
        world.linked, world.to_giver, world.to_taker = False, (), ()
        while world.sealing or world.reads or world.stopping or world.wake_at < math.inf:
            assert world.now < 10 * DEADLINE, "it goes on for ever"
            if world.sealing:
                world.sealed(None)
            if world.reads:
                world.read_ends()
            if world.stopping:
                world.pull_ends("stopped")
            if world.wake_at < math.inf:
                world.tick()
        world.check()
        if world.giver_alive and world.offered:
            assert world.giver_released, "the giver's side never ended"
        if world.taker_alive and world.taker.phase is not Phase.NEW:
            assert world.taker.phase is Phase.RELEASED, "the taker's side never ended"


def _all_but(kind: type, *names: str) -> Callable[[object], tuple[object, ...]]:
    return attrgetter(*(spec.name for spec in fields(kind) if spec.name not in names))


_GIVER, _TAKER, _WORLD = _all_but(GiverTransfer), _all_but(TakerTransfer, "verified"), _all_but(World, "giver", "taker")


def walk(start: World, *names: str) -> list[World]:
    """The worlds passed on the way of these moves, `start` included."""
    worlds = [start]
    for name in names:
        worlds.append(next(after for move, after in worlds[-1].moves() if move.startswith(name)))
    return worlds


def explore(starts: Iterable[World], depth: int) -> int:
    """Visit every state within `depth` moves of `starts`, nearest first; returns how many there were. An AssertionError
    carries the moves that led to it."""
    frontier: list[tuple[World, tuple[str, ...]]] = [(start, ()) for start in starts]
    seen = {start.key() for start, _ in frontier}
    for _ in range(depth):
        following: list[tuple[World, tuple[str, ...]]] = []
        for world, path in frontier:
            for after, trace in judged(world, path):
                if (key := after.key()) not in seen:
                    seen.add(key)
                    following.append((after, trace))
        frontier = following
    return len(seen)


def wander(start: World, steps: int, choose: Callable[[list[World]], World]) -> None:
    """One run, `choose` picking among the worlds that may follow."""
    world = start
    for _ in range(steps):
        following = [after for after, _ in judged(world, ())]
        if not following:
            return
        world = choose(following)


def judged(world: World, path: tuple[str, ...]) -> Iterator[tuple[World, tuple[str, ...]]]:
    """Every world that one move leads to, its laws checked."""
    trace = path
    try:
        for name, after in world.moves():
            trace = (*path, name)
            after.check()
            after.wind_down()
            yield after, trace
    except AssertionError as error:
        raise AssertionError(f"{error}, after: " + "; ".join(trace)) from error
