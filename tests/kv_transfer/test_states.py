"""The state machines of the hand-off: exact instructions, event by event."""

from __future__ import annotations

import pytest

from kv_transfer import states
from kv_transfer.states import GiverTransfer, Instruction, Outcome, Phase, Release, TakerTransfer

OPEN = states.Opened(10)


def giver(*events: states.Event) -> tuple[GiverTransfer, list[Instruction]]:
    machine = GiverTransfer(lease_s=10)
    return machine, [instruction for event in events for instruction in machine.handle(event, now=0)]


def taker(*events: states.Event) -> tuple[TakerTransfer, list[Instruction]]:
    machine = TakerTransfer(lease_s=10, stall_s=5, deadline=60)
    return machine, [instruction for event in events for instruction in machine.handle(event, now=0)]


TRANSFERRING = (states.Begin(), states.OfferReceived())
PULLING = (*TRANSFERRING, states.SealedReceived(0, 1), states.PullBegan())
GIVEN = (OPEN, states.Wanted(0), states.Written(), states.Computed(), states.SealEnded())


# --- giver -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(OPEN, states.Wanted(3)), (states.Wanted(3), OPEN)])
def test_offer_and_want_meet_in_either_order(order: tuple[states.Event, ...]) -> None:
    machine, said = giver(*order)
    assert said == [states.SendOffer()]
    assert machine.phase is Phase.TRANSFERRING


def test_what_is_written_is_sealed_and_named_while_more_is_computed() -> None:
    _, said = giver(OPEN, states.Wanted(0), states.Written(), states.SealEnded(), states.Written(), states.SealEnded())
    sealed = [states.Seal(), states.SendSealed()]
    assert said == [states.SendOffer(), *sealed, *sealed]


def test_what_is_written_while_a_thread_seals_is_sealed_after_it() -> None:
    machine, said = giver(OPEN, states.Wanted(0), states.Written(), states.Written(), states.Computed())
    assert said == [states.SendOffer(), states.Seal()]
    assert machine.handle(states.SealEnded(), 0) == [states.SendSealed(), states.Seal()]
    assert machine.handle(states.SealEnded(), 0) == [states.SendSealed(), states.SendComplete()]


def test_what_was_written_before_anybody_asked_is_sealed_then() -> None:
    machine, said = giver(OPEN, states.Written(), states.Computed())
    assert said == []
    assert machine.handle(states.Wanted(3), 0) == [states.SendOffer(), states.Seal()]


@pytest.mark.parametrize("start", [-1, 11])
def test_a_want_of_tokens_that_are_not_there_is_a_failure(start: int) -> None:
    _, said = giver(OPEN, states.Wanted(start))
    reason = f"token {start} was asked for of a prompt of 10"
    assert said == [states.SendWithdrawn(reason, Outcome.FAILED), Release(Outcome.FAILED, reason)]


def test_a_seal_that_fails_ends_the_transfer() -> None:
    _, said = giver(OPEN, states.Wanted(0), states.Written(), states.SealEnded("no memory"))
    assert said[-1] == Release(Outcome.FAILED, "no memory")


def test_a_commit_releases_the_givers_blocks() -> None:
    _, said = giver(*GIVEN, states.CommitReceived())
    assert said[-1] == Release(Outcome.COMMITTED, "")


def test_a_commit_before_the_last_piece_was_named_is_not_believed() -> None:
    machine, _ = giver(*GIVEN[:-1], states.CommitReceived())
    assert machine.phase is Phase.TRANSFERRING


def test_an_offer_nobody_asks_for_expires_after_the_lease() -> None:
    machine, _ = giver(OPEN)
    assert machine.wake_at == 10
    assert machine.handle(states.Tick(), 9.9) == []
    assert machine.handle(states.Tick(), 10) == [Release(Outcome.EXPIRED, "not asked for or renewed within 10 s")]


def test_who_reads_keeps_the_lease() -> None:
    machine, _ = giver(*GIVEN)
    assert machine.handle(states.ReadStarted(), 9) == []
    assert machine.handle(states.Tick(), 11) == []
    assert machine.wake_at == 19


def test_renewals_keep_the_lease_and_are_answered() -> None:
    machine, _ = giver(*GIVEN)
    assert machine.handle(states.Renewal(sent_at=77), now=9) == [states.SendRenewed(77)]
    assert machine.wake_at == 19


def test_an_offer_is_kept_for_a_taker_that_waits_for_blocks() -> None:
    machine, said = giver(OPEN, states.Expected())
    assert said == []
    for now in (9.0, 18.0, 27.0):
        assert machine.handle(states.Tick(), now) == []
        assert machine.handle(states.Renewal(sent_at=now), now) == [states.SendRenewed(now)]
    assert machine.handle(states.Wanted(3), 30) == [states.SendOffer()]


def test_an_offer_whose_taker_falls_silent_while_it_waits_expires() -> None:
    machine, _ = giver(states.Expected(), OPEN)
    reason = "not asked for or renewed within 10 s"
    ended = [states.SendWithdrawn(reason, Outcome.EXPIRED), Release(Outcome.EXPIRED, reason)]
    assert machine.handle(states.Tick(), 10) == ended


def test_an_offer_does_not_outlive_the_link_of_the_taker_that_waits_for_it() -> None:
    _, said = giver(states.Expected(), OPEN, states.LinkLost("gone"))
    assert said == [Release(Outcome.FAILED, "gone")]


def test_a_cancel_while_the_blocks_are_read_drains_first() -> None:
    machine, said = giver(OPEN, states.Wanted(0), states.Written(), states.CancelReceived("gone"))
    assert said == [states.SendOffer(), states.Seal()]
    assert machine.phase is Phase.DRAINING
    assert machine.handle(states.SealEnded(), 1) == [Release(Outcome.ABORTED, "gone")]


def test_a_transfer_cancelled_before_its_offer_releases_the_blocks_as_soon_as_they_come() -> None:
    machine, said = giver(states.Wanted(0), states.CancelReceived("gone"))
    assert said == []
    assert machine.handle(OPEN, 1) == [Release(Outcome.ABORTED, "gone")]


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
    machine, _ = giver(*GIVEN, states.CommitReceived())
    assert machine.handle(states.Wanted(0), 1) == [states.SendWithdrawn("it was committed before", Outcome.FAILED)]


# --- taker -----------------------------------------------------------------------------------------------------------


def test_the_taker_commits_once_everything_is_verified_and_quiet() -> None:
    _, said = taker(*PULLING, states.PieceVerified(0), states.CompleteReceived(1), states.PullEnded())
    assert said == [
        states.SendWant(),
        states.StartPull(0, 1),
        states.SendCommitted(),
        Release(Outcome.COMMITTED, ""),
    ]


def test_what_is_named_during_a_pull_is_brought_by_the_next() -> None:
    machine, _ = taker(*PULLING, states.SealedReceived(1, 2), states.SealedReceived(3, 1), states.PieceVerified(0))
    assert machine.handle(states.PullEnded(), 1) == [states.StartPull(1, 4)]


def test_a_taker_that_has_all_that_was_named_waits_for_more_without_stalling() -> None:
    machine, _ = taker(*PULLING, states.PieceVerified(0), states.PullEnded())
    assert machine.stalled_at == float("inf")
    assert machine.handle(states.CompleteReceived(1), 1) == [states.SendCommitted(), Release(Outcome.COMMITTED, "")]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (states.SealedReceived(2, 1), "piece 2 was named when it was the turn of 1"),
        (states.CompleteReceived(2), "of 2 pieces 1 were named"),
    ],
)
def test_a_piece_that_was_lost_is_noticed(event: states.Event, reason: str) -> None:
    machine, _ = taker(*PULLING)
    assert machine.handle(event, 1) == [states.SendCancel(reason), states.StopPull()]


def test_a_piece_named_twice_is_pulled_once() -> None:
    machine, _ = taker(*PULLING, states.SealedReceived(0, 1))
    assert machine.num_pieces == 1


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


def test_an_answer_to_a_renewal_that_was_never_sent_gives_no_longer_lease() -> None:
    machine, _ = taker(states.Begin())
    machine.handle(states.Renewal(sent_at=1e9), now=6)
    assert machine.lease_until == 16


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
