"""A world of one giver, one taker and a bad network between them, small enough to visit every state of (explorer.py).

Messages may be lost, doubled and overtaken; either side may die, the link may break, owners may cancel and withdraw,
transports may fail, and time may pass, in any order, while the giver's engine writes KV piece by piece. `check` holds
in every state; `wind_down` lets nothing more go wrong except that nobody hears anybody, and then everything must end.

It is always now 0: as time passes, what lies ahead comes nearer. So two histories that differ in when they happened
only are the same state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar

from msgspec.structs import replace

from kv_transfer import states
from kv_transfer.states import GiverTransfer, Outcome, Phase, Release, TakerTransfer

LEASE, STALL, DEADLINE, PIECES = 4.0, 3.0, 9.0, 2

M = TypeVar("M", GiverTransfer, TakerTransfer)


def new_giver() -> GiverTransfer:
    return _known(GiverTransfer(LEASE))


def new_taker() -> TakerTransfer:
    return _known(TakerTransfer(LEASE, STALL, DEADLINE))


@dataclass
class World:
    giver: GiverTransfer = field(default_factory=new_giver)
    taker: TakerTransfer = field(default_factory=new_taker)
    to_giver: tuple[states.Event, ...] = ()
    to_taker: tuple[states.Event, ...] = ()
    giver_alive: bool = True
    taker_alive: bool = True
    linked: bool = True
    # The giver's owner and threads.
    opened: bool = False
    written: int = 0
    """Pieces of which the KV is final."""
    computed: bool = False
    sealing: int = 0
    """How many will be sealed when the thread that seals has ended; 0 when none does."""
    sealed: int = 0
    named: int = 0
    reads: int = 0
    # The taker's owner and transport.
    reserved: bool = False
    heard: frozenset[int] = frozenset()
    """Pieces that it was told of."""
    pulling: tuple[int, int] | None = None
    began: bool = False
    stopping: bool = False
    arrived: frozenset[int] = frozenset()
    # What came of it.
    giver_released: tuple[Outcome, ...] = ()
    taker_released: tuple[Outcome, ...] = ()
    spent: frozenset[str] = frozenset()
    """Faults and decisions that happen at most once in a run."""
    elapsed: float = 0.0

    def __post_init__(self) -> None:
        self.giver, self.taker = _known(self.giver), _known(self.taker)

    def key(self) -> tuple[object, ...]:
        return (id(self.taker), id(self.giver), _WORLD(self))

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
        if self.giver_alive and not self.opened:
            yield self._do("open", World.open)
        if self.giver_alive and self.opened and not self.giver_released:
            if self.written < PIECES:
                yield self._do("write", World.write)
            elif not self.computed:
                yield self._do("compute", World.compute)
        if self.giver_alive:
            yield from self._once("withdraw", World.feed_giver, states.Withdraw("withdrawn"))
            yield from self._once("finish", World.feed_giver, states.Withdraw("finished", finished=True))
            yield from self._once("shut down", World.feed_giver, states.Withdraw("stopping", Outcome.FAILED))
        if self.taker_alive and self.taker.phase is not Phase.NEW:
            for event in (states.CancelRequested(), states.Unusable("nonsense was named")):  # one of them: it ends
                yield from self._once("cancel", World.feed_taker, event)

    def _threads(self) -> Iterator[tuple[str, World]]:
        if self.sealing:
            yield self._do("sealed", World.seal_ends, None)
            yield from self._once("seal fails", World.seal_ends, "no memory")
        if self.giver_alive and self.giver.may_read and self.named and not self.reads:
            yield from self._once("read", World.read)
        if self.reads:
            yield self._do("read ends", World.read_ends)
        if self.pulling is not None and self.taker_alive:
            yield from self._pull(set(range(*self.pulling)))

    def _pull(self, job: set[int]) -> Iterator[tuple[str, World]]:
        if not self.began:
            yield self._do("pull begins", World.begin_pull)
        for index in job - self.arrived if self.began else ():
            yield self._do(f"piece {index}", World.arrive, index)
        if job <= self.arrived:
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
        after = object.__new__(World)
        after.__dict__.update(self.__dict__)  # machines do not change
        move(after, *arguments)
        return name, after

    def _once(self, name: str, move: Any, *arguments: Any) -> Iterator[tuple[str, World]]:
        if name not in self.spent:
            _, after = self._do(name, move, *arguments)
            after.spent |= {name}
            yield name, after

    # --- moves -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        past = max(0.0, self.wake_at)
        self.elapsed += past
        self.giver = _nearer(self.giver, past, "lease_until")
        self.taker = _nearer(self.taker, past, "lease_until", "renew_at", "stalled_at", "deadline")
        self.to_giver, self.to_taker = _aged(self.to_giver, past), _aged(self.to_taker, past)
        if self.giver_alive:
            self.feed_giver(states.Tick())
        if self.taker_alive:
            self.feed_taker(states.Tick())

    def deliver(self, box: str, index: int) -> None:
        message = getattr(self, box)[index]
        self.lose(box, index)
        if isinstance(message, states.SealedReceived):
            self.heard |= set(range(message.first, message.first + message.count))
        if box == "to_giver" and self.giver_alive:
            self.feed_giver(message)
        elif box == "to_taker" and self.taker_alive:
            self.feed_taker(message)

    def lose(self, box: str, index: int) -> None:
        messages = getattr(self, box)
        setattr(self, box, messages[:index] + messages[index + 1 :])

    def double(self, box: str, index: int) -> None:
        self._send(box, getattr(self, box)[index])

    def open(self) -> None:
        self.opened = True
        self.feed_giver(states.Opened(10))

    def write(self) -> None:
        self.written += 1
        self.feed_giver(states.Written())

    def compute(self) -> None:
        self.computed = True
        self.feed_giver(states.Computed())

    def begin(self) -> None:
        self.reserved = True
        self.feed_taker(states.Begin())

    def seal_ends(self, error: str | None) -> None:
        if error is None:
            self.sealed = self.sealing
        self.sealing = 0
        self.feed_giver(states.SealEnded(error))

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
        self.pulling, self.began, self.stopping = None, False, False
        self.feed_taker(states.PullEnded(error))

    def break_link(self) -> None:
        """What is on the way may still arrive; nothing sent later does."""
        self.linked = False
        if self.giver_alive:
            self.feed_giver(states.LinkLost("cut"))
        if self.taker_alive:
            self.feed_taker(states.LinkLost("cut"))

    def kill_giver(self) -> None:
        self.giver_alive, self.sealing, self.reads = False, 0, 0
        self.giver = new_giver()  # whatever it was, nobody will know
        if self.linked and self.taker_alive and self.taker.phase is not Phase.NEW:
            self.feed_taker(states.LinkLost("giver died"))
        self.linked, self.to_giver = False, ()

    def kill_taker(self) -> None:
        self.taker_alive, self.pulling, self.began, self.stopping = False, None, False, False
        self.taker = new_taker()
        if self.linked and self.giver_alive:
            self.feed_giver(states.LinkLost("taker died"))
        self.linked, self.to_taker = False, ()

    # --- machines ----------------------------------------------------------------------------------------------------

    def feed_giver(self, event: states.Event) -> None:
        self.giver, instructions = _fed(self.giver, event)
        for instruction in instructions:
            match instruction:
                case states.SendOffer():
                    self._send("to_taker", states.OfferReceived())
                case states.Seal():
                    assert not self.sealing, "two threads seal"
                    assert self.sealed < self.written, "there is nothing to seal"
                    self.sealing = self.written
                case states.SendSealed():
                    assert self.named < self.sealed, "pieces are named twice"
                    self._send("to_taker", states.SealedReceived(self.named, self.sealed - self.named))
                    self.named = self.sealed
                case states.SendComplete():
                    assert self.computed, "complete before it was computed"
                    assert self.named == self.written, "complete before all was named"
                    self._send("to_taker", states.CompleteReceived(self.named))
                case states.SendRenewed(sent_at):
                    self._send("to_taker", states.Renewal(sent_at))
                case states.SendWithdrawn(reason, outcome, finished):
                    self._send("to_taker", states.Withdraw(reason, outcome, finished))
                case Release(outcome):
                    self.giver_released += (outcome,)

    def feed_taker(self, event: states.Event) -> None:
        self.taker, instructions = _fed(self.taker, event)
        for instruction in instructions:
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
                case states.StartPull(first, stop):
                    assert self.pulling is None, "two pulls at a time"
                    assert not self.arrived.intersection(range(first, stop)), "a piece is pulled twice"
                    assert first < stop, "a pull of nothing"
                    assert self.heard.issuperset(range(first, stop)), "a pull of pieces that were not named"
                    self.pulling = first, stop
                case states.StopPull():
                    assert self.pulling is not None, "there is no pull to stop"
                    self.stopping = True
                case Release(outcome):
                    self.taker_released += (outcome,)

    def _send(self, box: str, message: states.Event) -> None:
        if self.linked:
            setattr(self, box, tuple(sorted((*getattr(self, box), message), key=_rank)))

    # --- laws --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        assert len(self.giver_released) <= 1, "the giver's blocks were freed twice"
        assert len(self.taker_released) <= 1, "the taker's blocks were freed twice"
        assert not self.giver_released or self.opened, "blocks were freed that were never given"
        assert not self.taker_released or self.reserved, "blocks were freed that were never reserved"
        assert not self.taker.finished or "finish" in self.spent, "the taker believes in a finish that was not"
        assert not self.giver_released or not (self.sealing or self.reads), "freed under a reader"
        assert not self.taker_released or self.pulling is None, "freed under a transport"
        if self.taker_released == (Outcome.COMMITTED,):
            assert self.arrived == frozenset(range(PIECES)), "committed from pieces that were not verified"
            assert self.computed, "committed before the prompt was computed"
        if self.giver.outcome is Outcome.COMMITTED:
            assert self.taker_released == (Outcome.COMMITTED,), "the giver believes in a commit that was not"
        if self.taker.phase is self.giver.phase is Phase.TRANSFERRING and self.giver_alive and self.taker_alive:
            assert self.taker.lease_until <= self.giver.lease_until, "the giver's lease ends first"
        if self.giver.phase is Phase.RELEASED and self.opened:
            assert self.giver_released, "the giver's blocks leaked"
        if self.taker.phase is Phase.RELEASED and self.reserved:
            assert self.taker_released or not self.taker_alive, "the taker's blocks leaked"
        if self.taker_alive and self.pulling is not None and self.taker.phase is Phase.DRAINING:
            assert self.stopping, "a transport that nobody waits for was not told to stop"

    def alone(self) -> World:
        """The same, and from now on nobody hears anybody."""
        after = self._do("", lambda _: None)[1]
        after.linked, after.to_giver, after.to_taker, after.spent, after.elapsed = False, (), (), frozenset(), 0.0
        if "finish" in self.spent:
            after.spent = frozenset({"finish"})
        return after

    def wind_down(self) -> None:
        """Of a world where nobody hears anybody: threads end, time passes. It is changed."""
        while self.sealing or self.reads or self.stopping or self.wake_at < math.inf:
            assert self.elapsed < 10 * DEADLINE, "it goes on for ever"
            if self.sealing:
                self.seal_ends(None)
            if self.reads:
                self.read_ends()
            if self.stopping:
                self.pull_ends("stopped")
            if self.wake_at < math.inf:
                self.tick()
        self.check()
        if self.giver_alive and self.opened:
            assert self.giver_released, "the giver's side never ended"
        if self.taker_alive and self.taker.phase is not Phase.NEW:
            assert self.taker.phase is Phase.RELEASED, "the taker's side never ended"


def _all_but(kind: type, *names: str) -> Callable[[object], tuple[object, ...]]:
    return attrgetter(*(spec.name for spec in fields(kind) if spec.name not in names))


_GIVER, _TAKER = _all_but(GiverTransfer), _all_but(TakerTransfer, "verified")
_WORLD = _all_but(World, "giver", "taker", "elapsed")


_KNOWN: dict[tuple[object, ...], Any] = {}
_FED: dict[tuple[int, states.Event], Any] = {}


def _known(machine: M) -> M:
    """The one of its kind and state. Such are never changed: what is done to one leads to another. So a state of
    theirs is an id, and what an event does to it is reckoned once, however many worlds it is a part of."""
    of_kind = _GIVER(machine) if isinstance(machine, GiverTransfer) else (*_TAKER(machine), frozenset(machine.verified))
    return _KNOWN.setdefault((type(machine), *of_kind), machine)


def _fed(machine: M, event: states.Event) -> tuple[M, list[states.Instruction]]:
    """What it becomes, and says."""
    if (found := _FED.get((id(machine), event))) is None:
        after = _copy(machine)
        instructions = after.handle(event, 0.0)
        found = _FED[id(machine), event] = _known(after), instructions
    return found


def _copy(machine: M) -> M:
    """copy.copy, several times as fast."""
    if isinstance(machine, GiverTransfer):
        return type(machine)(*_GIVER(machine))
    return type(machine)(*_TAKER(machine), verified=set(machine.verified))


def _nearer(machine: M, past: float, *names: str) -> M:
    """What lies ahead has come nearer by `past`."""
    machine = _copy(machine)
    for name in names:
        setattr(machine, name, getattr(machine, name) - past)
    return _known(machine)


_RANKS: dict[states.Event, int] = {}


def _rank(message: states.Event) -> int:
    """Any order will do, as long as it is one: messages overtake each other."""
    return _RANKS.setdefault(message, len(_RANKS))


def _aged(messages: tuple[states.Event, ...], past: float) -> tuple[states.Event, ...]:
    aged = (replace(m, sent_at=m.sent_at - past) if isinstance(m, states.Renewal) else m for m in messages)
    return tuple(sorted(aged, key=_rank))
