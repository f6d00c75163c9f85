"""The state machines of the hand-off: exact instructions for the usual ways, every state for the laws."""

from __future__ import annotations

import random

import pytest
from explorer import DEADLINE, LEASE, PIECES, STALL, World, explore, walk, wander

from kv_transfer import states
from kv_transfer.states import GiverTransfer, Instruction, Outcome, Phase, Release, TakerTransfer

USUAL_WAY = (
    *("begin", "offer", "Wanted", "sealed", "OfferReceived", "pull begins"),
    *(f"piece {index}" for index in range(PIECES)),
    *("pull ends", "CommitReceived"),
)
LONG_WAIT = ("expect", "Expected", "offer", *("time passes", "Renewal", "Renewal") * 6, "begin", "Wanted")
"""The taker is out of blocks for longer than a lease."""


def giver(*events: states.Event) -> tuple[GiverTransfer, list[Instruction]]:
    machine = GiverTransfer(lease_s=10)
    return machine, [instruction for event in events for instruction in machine.handle(event, now=0)]


def taker(*events: states.Event) -> tuple[TakerTransfer, list[Instruction]]:
    machine = TakerTransfer(lease_s=10, stall_s=5, deadline=60)
    return machine, [instruction for event in events for instruction in machine.handle(event, now=0)]


PULLING = (states.Begin(), states.OfferReceived(1), states.PullBegan())


# --- giver -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(states.Offered(), states.Wanted(3)), (states.Wanted(3), states.Offered())])
def test_offer_and_want_meet_in_either_order(order: tuple[states.Event, ...]) -> None:
    machine, said = giver(*order, states.Prepared())
    assert said == [states.Prepare(3), states.SendOffer()]
    assert machine.phase is Phase.TRANSFERRING


def test_a_commit_releases_the_givers_blocks() -> None:
    _, said = giver(states.Offered(), states.Wanted(0), states.Prepared(), states.CommitReceived())
    assert said[-1] == Release(Outcome.COMMITTED, "")


def test_a_commit_before_the_offer_was_sent_is_not_believed() -> None:
    machine, _ = giver(states.Offered(), states.Wanted(0), states.CommitReceived())
    assert machine.phase is Phase.TRANSFERRING


def test_an_offer_nobody_asks_for_expires_after_the_lease() -> None:
    machine, _ = giver(states.Offered())
    assert machine.wake_at == 10
    assert machine.handle(states.Tick(), 9.9) == []
    assert machine.handle(states.Tick(), 10) == [Release(Outcome.EXPIRED, "not asked for or renewed within 10 s")]


def test_renewals_keep_the_lease_and_are_answered() -> None:
    machine, _ = giver(states.Offered(), states.Wanted(0), states.Prepared())
    assert machine.handle(states.Renewal(sent_at=77), now=9) == [states.SendRenewed(77)]
    assert machine.wake_at == 19


def test_an_offer_is_kept_for_a_taker_that_waits_for_blocks() -> None:
    machine, said = giver(states.Offered(), states.Expected())
    assert said == []
    for now in (9.0, 18.0, 27.0):
        assert machine.handle(states.Tick(), now) == []
        assert machine.handle(states.Renewal(sent_at=now), now) == [states.SendRenewed(now)]
    assert machine.handle(states.Wanted(3), 30) == [states.Prepare(3)]


def test_an_offer_whose_taker_falls_silent_while_it_waits_expires() -> None:
    machine, _ = giver(states.Expected(), states.Offered())
    reason = "not asked for or renewed within 10 s"
    ended = [states.SendWithdrawn(reason, Outcome.EXPIRED), Release(Outcome.EXPIRED, reason)]
    assert machine.handle(states.Tick(), 10) == ended


def test_an_offer_does_not_outlive_the_link_of_the_taker_that_waits_for_it() -> None:
    _, said = giver(states.Expected(), states.Offered(), states.LinkLost("gone"))
    assert said == [Release(Outcome.FAILED, "gone")]


def test_a_cancel_while_the_blocks_are_read_drains_first() -> None:
    machine, said = giver(states.Offered(), states.Wanted(0), states.CancelReceived("gone"))
    assert said == [states.Prepare(0)]
    assert machine.phase is Phase.DRAINING
    assert machine.handle(states.Prepared(), 1) == [Release(Outcome.ABORTED, "gone")]


def test_a_transfer_cancelled_before_its_offer_releases_the_blocks_as_soon_as_they_come() -> None:
    machine, said = giver(states.Wanted(0), states.CancelReceived("gone"))
    assert said == []
    assert machine.handle(states.Offered(), 1) == [Release(Outcome.ABORTED, "gone")]


def test_whoever_asks_after_the_end_hears_how_it_ended() -> None:
    machine, _ = giver(states.Withdraw("prompt aborted"))
    told = [states.SendWithdrawn("already aborted: prompt aborted", Outcome.ABORTED)]
    assert machine.handle(states.Wanted(0), 1) == told
    assert machine.handle(states.Renewal(1), 1) == told


@pytest.mark.parametrize("finished", [True, False])
def test_a_withdrawal_says_whether_the_request_has_finished(finished: bool) -> None:
    withdraw = states.Withdraw("first token", finished=finished)
    machine, said = giver(states.Expected(), withdraw)
    assert said == [states.SendWithdrawn("first token", Outcome.ABORTED, finished)]
    machine.handle(states.Withdraw("aborted", finished=not finished), 1)
    late = [states.SendWithdrawn("already aborted: first token", Outcome.ABORTED, finished)]
    assert machine.handle(states.Expected(), 1) == machine.handle(states.Wanted(0), 1) == late


def test_what_was_committed_cannot_be_taken_again() -> None:
    machine, _ = giver(states.Offered(), states.Wanted(0), states.Prepared(), states.CommitReceived())
    assert machine.handle(states.Wanted(0), 1) == [states.SendWithdrawn("it was committed before", Outcome.FAILED)]


# --- taker -----------------------------------------------------------------------------------------------------------


def test_the_taker_commits_once_everything_is_verified_and_quiet() -> None:
    _, said = taker(*PULLING, states.PieceVerified(0), states.PullEnded())
    assert said == [
        states.SendWant(),
        states.StartPull(),
        states.SendCommitted(),
        Release(Outcome.COMMITTED, ""),
    ]


def test_a_transport_that_returns_early_is_a_failure() -> None:
    _, said = taker(*PULLING, states.PullEnded())
    assert said[-2:] == [
        states.SendCancel("1 of 1 pieces did not arrive"),
        Release(Outcome.FAILED, "1 of 1 pieces did not arrive"),
    ]


def test_a_cancel_stops_the_transport_and_waits_for_it() -> None:
    machine, said = taker(*PULLING, states.CancelRequested())
    assert said[-2:] == [states.SendCancel("cancelled"), states.StopPull()]
    assert machine.handle(states.PieceVerified(0), 1) == []
    assert machine.handle(states.PullEnded("stopped"), 1) == [Release(Outcome.ABORTED, "cancelled")]


def test_a_lease_counts_from_the_sending_of_the_renewal_that_was_answered() -> None:
    machine, _ = taker(states.Begin())
    assert machine.wake_at == 2.5
    assert machine.handle(states.Tick(), 2.5) == [states.SendRenew(2.5)]
    machine.handle(states.Renewal(sent_at=2.5), now=6)
    assert machine.lease_until == 12.5


def test_a_taker_without_blocks_announces_itself_renews_and_asks_when_it_has_them() -> None:
    machine, said = taker(states.Expect())
    assert said == [states.SendExpect()]
    assert machine.handle(states.Tick(), 2.5) == [states.SendRenew(2.5)]
    machine.handle(states.Renewal(sent_at=2.5), now=3)
    assert machine.handle(states.Begin(), 4) == [states.SendWant()]
    assert machine.lease_until == 12.5, "asking is no sign of life of the giver"


@pytest.mark.parametrize(
    ("event", "now", "outcome"),
    [
        (states.Withdraw("gone"), 1, Outcome.ABORTED),
        (states.LinkLost("gone"), 1, Outcome.FAILED),
        (states.Tick(), 10, Outcome.EXPIRED),
        (states.CancelRequested(), 1, Outcome.ABORTED),
    ],
)
def test_a_wait_for_blocks_that_ends_has_nothing_to_release(event: states.Event, now: float, outcome: Outcome) -> None:
    machine, _ = taker(states.Expect())
    said = machine.handle(event, now)
    assert not any(isinstance(instruction, Release) for instruction in said)
    assert (machine.phase, machine.outcome) == (Phase.RELEASED, outcome)


def test_a_wait_for_blocks_ends_with_the_deadline() -> None:
    machine, _ = taker(states.Expect())
    machine.handle(states.Renewal(sent_at=59), now=59)
    assert machine.handle(states.Tick(), 60) == [states.SendCancel("the deadline of the request has passed")]


def test_a_silent_giver_ends_the_transfer_with_the_lease() -> None:
    machine, _ = taker(states.Begin())
    ended = machine.handle(states.Tick(), 10)
    assert ended[-1] == Release(Outcome.EXPIRED, "the giver has not answered for 10 s")


def test_a_transport_without_progress_is_stopped() -> None:
    machine, _ = taker(*PULLING)
    machine.handle(states.Renewal(sent_at=4), now=4)
    assert machine.handle(states.Tick(), 5) == [states.SendCancel("no piece arrived for 5 s"), states.StopPull()]


# --- laws ------------------------------------------------------------------------------------------------------------


def test_the_usual_way_commits_on_both_sides() -> None:
    end = walk(World(), *USUAL_WAY)[-1]
    assert end.giver_released == end.taker_released == (Outcome.COMMITTED,)


def test_every_state_near_the_usual_way_keeps_the_laws() -> None:
    assert explore(walk(World(), *USUAL_WAY), depth=4) > 15_000


def test_a_long_wait_for_blocks_keeps_the_laws_and_commits() -> None:
    way = walk(World(), *LONG_WAIT)
    assert way[-3].now > LEASE
    assert explore(way[:9], depth=4) > 10_000
    end = walk(way[-1], *USUAL_WAY[3:])[-1]
    assert end.giver_released == end.taker_released == (Outcome.COMMITTED,)


@pytest.mark.parametrize("seed", range(4))
def test_long_unlucky_runs_keep_the_laws(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        wander(World(), 40, chance.choice)


class FreesUnderReaders(GiverTransfer):
    def _end(self, outcome: Outcome, reason: str, *, tell: bool = False, finished: bool = False) -> list[Instruction]:
        self.readers = 0 if self.phase is not Phase.RELEASED else self.readers
        return GiverTransfer._end(self, outcome, reason, tell=tell, finished=finished)

    def _on_read_ended(self) -> list[Instruction]:
        return []


class ForgetsTheLease(GiverTransfer):
    def _renew(self, now: float) -> None:
        pass


class KeepsTheOfferForWhoeverWaits(GiverTransfer):
    def _renew(self, now: float) -> None:
        self.lease_until = float("inf") if self.awaited and self.start_token is None else now + self.lease_s


class BelievesAnyCommit(GiverTransfer):
    def handle(self, event: states.Event, now: float) -> list[Instruction]:
        if isinstance(event, states.CancelReceived):
            event = states.CommitReceived()
        return GiverTransfer.handle(self, event, now)


class KeepsBlocksOfferedLate(GiverTransfer):
    def _on_offered(self, now: float) -> list[Instruction]:
        if self.phase is Phase.RELEASED:
            self.offered = True
            return []
        return GiverTransfer._on_offered(self, now)


class FreesTwice(GiverTransfer):
    def _on_read_ended(self) -> list[Instruction]:
        self.readers -= 1
        return self._release() if self.phase in (Phase.DRAINING, Phase.RELEASED) else []

    def _end(self, outcome: Outcome, reason: str, *, tell: bool = False, finished: bool = False) -> list[Instruction]:
        self.outcome = outcome
        return self._release()


class CommitsWithoutVerifying(TakerTransfer):
    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.verified = set(range(self.num_pieces))
        return TakerTransfer._on_pull_ended(self, error)


class FreesUnderTransport(TakerTransfer):
    def _end(self, outcome: Outcome, reason: str, *, tell: bool = True) -> list[Instruction]:
        self.outcome, self.reason = outcome, reason
        return self._release()


class LeaseFromTheAnswer(TakerTransfer):
    def handle(self, event: states.Event, now: float) -> list[Instruction]:
        if isinstance(event, states.Renewal):
            event = states.Renewal(now + 1)
        return TakerTransfer.handle(self, event, now)


class WaitsForEver(TakerTransfer):
    def _on_tick(self, now: float) -> list[Instruction]:
        self.lease_until = self.renew_at = self.stalled_at = self.deadline = float("inf")
        return []


class NeverStopsTheTransport(TakerTransfer):
    def _after_end(self, event: states.Event) -> list[Instruction]:
        return []


class ExpectsForEver(TakerTransfer):
    def _on_expect(self, now: float) -> list[Instruction]:
        self.phase, self.deadline = Phase.EXPECTING, float("inf")
        return [states.SendExpect()]


class FreesWhatItNeverHad(TakerTransfer):
    def _on_expect(self, now: float) -> list[Instruction]:
        self.reserved = True
        return TakerTransfer._on_expect(self, now)


GIVER_MUTANTS = [
    *(FreesUnderReaders, ForgetsTheLease, KeepsTheOfferForWhoeverWaits, BelievesAnyCommit, KeepsBlocksOfferedLate),
    FreesTwice,
]
TAKER_MUTANTS = [
    *(CommitsWithoutVerifying, FreesUnderTransport, LeaseFromTheAnswer, WaitsForEver, ExpectsForEver),
    *(FreesWhatItNeverHad, NeverStopsTheTransport),
]


@pytest.mark.parametrize("mutant", GIVER_MUTANTS)
def test_the_explorer_finds_a_broken_giver(mutant: type[GiverTransfer]) -> None:
    with pytest.raises(AssertionError):
        explore(walk(World(giver=mutant(LEASE)), *USUAL_WAY[:6]), depth=4)


@pytest.mark.parametrize("mutant", TAKER_MUTANTS)
def test_the_explorer_finds_a_broken_taker(mutant: type[TakerTransfer]) -> None:
    with pytest.raises(AssertionError):
        explore(walk(World(taker=mutant(LEASE, STALL, DEADLINE)), *USUAL_WAY[:6]), depth=4)
