"""The laws of a hand-off in every state that the machines and a bad network get into, and mutants that break them."""

from __future__ import annotations

import random

import pytest
from explorer import Explorer, walk
from handoff_world import DEADLINE, LEASE, PIECES, STALL, World

from kv_transfer import states
from kv_transfer.states import GiverTransfer, Instruction, Outcome, Phase, TakerTransfer

USUAL_WAY = (
    *("begin", "open", "Wanted", "OfferReceived", "write", "sealed", "SealedReceived", "pull begins", "piece 0"),
    *("write", "sealed", "pull ends", "SealedReceived", "pull begins", "piece 1", "pull ends"),
    *("compute", "CompleteReceived", "CommitReceived"),
)
"""The second piece is written and named while the first is pulled."""
LATE_WAY = (
    *("open", "write", "write", "compute", "begin", "Wanted", "OfferReceived", "sealed", "SealedReceived"),
    *("pull begins", "piece 0", "piece 1", "pull ends", "CompleteReceived", "CommitReceived"),
)
"""The taker asks when everything is computed."""
LONG_WAIT = ("expect", "Expected", "open", *("time passes", "Renewal", "Renewal") * 6)
"""The taker is out of blocks for longer than a lease."""


@pytest.mark.parametrize("way", [USUAL_WAY, LATE_WAY, (*LONG_WAIT, *LATE_WAY[1:])])
def test_a_hand_off_without_mishap_commits_on_both_sides(way: tuple[str, ...]) -> None:
    end = walk(World(), *way)[-1]
    assert end.giver_released == end.taker_released == (Outcome.COMMITTED,)
    assert PIECES == 2


def test_every_state_within_eight_moves_keeps_the_laws() -> None:
    assert Explorer().explore([World()], depth=8) > 450_000


def test_every_state_within_four_moves_of_a_hand_off_keeps_the_laws() -> None:
    ways = [*walk(World(), *USUAL_WAY), *walk(World(), *LATE_WAY)]
    assert Explorer().explore(ways, depth=4) > 120_000


def test_a_long_wait_for_blocks_keeps_the_laws() -> None:
    way = walk(World(), *LONG_WAIT)
    assert way[-1].elapsed > LEASE
    assert Explorer().explore(way[:9], depth=4) > 25_000


@pytest.mark.parametrize("seed", range(4))
def test_long_unlucky_runs_keep_the_laws(seed: int) -> None:
    chance, explorer = random.Random(seed), Explorer()
    for _ in range(500):
        explorer.wander(World(), 60, chance.choice)


# --- mutants ---------------------------------------------------------------------------------------------------------


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


class KeepsBlocksOpenedLate(GiverTransfer):
    def _on_opened(self, num_tokens: int, now: float) -> list[Instruction]:
        if self.phase is Phase.RELEASED:
            self.num_tokens = num_tokens
            return []
        return GiverTransfer._on_opened(self, num_tokens, now)


class ForgetsWhatIsWrittenWhileSealing(GiverTransfer):
    def _on_seal_ended(self, error: str | None) -> list[Instruction]:
        self.unsealed = False
        return GiverTransfer._on_seal_ended(self, error)


class SealsTwiceAtATime(GiverTransfer):
    def _go_on(self) -> list[Instruction]:
        self.sealing = False
        return GiverTransfer._go_on(self)


class CompletesBeforeItIsComputed(GiverTransfer):
    def _on_seal_ended(self, error: str | None) -> list[Instruction]:
        self.computed = True
        return GiverTransfer._on_seal_ended(self, error)


class BelievesACommitBeforeTheLastPiece(GiverTransfer):
    def _transfer(self) -> list[Instruction]:
        said = GiverTransfer._transfer(self)
        self.complete_sent = True
        return [*said, states.SendComplete()]


class FreesTwice(GiverTransfer):
    def _on_read_ended(self) -> list[Instruction]:
        self.readers -= 1
        return self._release() if self.phase in (Phase.DRAINING, Phase.RELEASED) else []

    def _end(self, outcome: Outcome, reason: str, *, tell: bool = False, finished: bool = False) -> list[Instruction]:
        self.outcome = outcome
        return self._release()


class CommitsWithoutVerifying(TakerTransfer):
    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.verified = set(range(self.num_pulled))
        return TakerTransfer._on_pull_ended(self, error)


class CommitsWhenAllThatWasNamedIsHere(TakerTransfer):
    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.complete = True
        return TakerTransfer._on_pull_ended(self, error)


class DoesNotCountThePieces(TakerTransfer):
    def _on_complete(self, num_pieces: int) -> list[Instruction]:
        return TakerTransfer._on_complete(self, self.num_pieces)


class OverlooksALostPiece(TakerTransfer):
    def _on_sealed(self, first: int, count: int) -> list[Instruction]:
        return TakerTransfer._on_sealed(self, min(first, self.num_pieces), count)


class PullsWhatWasNamedTwice(TakerTransfer):
    def _on_sealed(self, first: int, count: int) -> list[Instruction]:
        return TakerTransfer._on_sealed(self, self.num_pieces, count)


class ForgetsWhatQueuesDuringAPull(TakerTransfer):
    def _on_pull_ended(self, error: str | None) -> list[Instruction]:
        self.num_pulled = self.num_pieces
        self.verified = set(range(self.num_pieces))
        return TakerTransfer._on_pull_ended(self, error)


class PullsTwiceAtATime(TakerTransfer):
    def _on_sealed(self, first: int, count: int) -> list[Instruction]:
        self.pulling = False
        return TakerTransfer._on_sealed(self, first, count)


class FreesUnderTransport(TakerTransfer):
    def _end(self, outcome: Outcome, reason: str, *, tell: bool = True) -> list[Instruction]:
        self.outcome, self.reason = outcome, reason
        return self._release()


class FreesUnderTransportWhatIsOfNoUse(TakerTransfer):
    def handle(self, event: states.Event, now: float) -> list[Instruction]:
        if isinstance(event, states.Unusable) and self.phase is Phase.TRANSFERRING:
            self.outcome = Outcome.FAILED
            return self._release()
        return TakerTransfer.handle(self, event, now)


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
    *(FreesUnderReaders, FreesTwice, ForgetsTheLease, KeepsTheOfferForWhoeverWaits, BelievesAnyCommit),
    *(KeepsBlocksOpenedLate, ForgetsWhatIsWrittenWhileSealing, SealsTwiceAtATime, CompletesBeforeItIsComputed),
    BelievesACommitBeforeTheLastPiece,
]
TAKER_MUTANTS = [
    *(CommitsWithoutVerifying, CommitsWhenAllThatWasNamedIsHere, DoesNotCountThePieces, OverlooksALostPiece),
    *(PullsWhatWasNamedTwice, ForgetsWhatQueuesDuringAPull, PullsTwiceAtATime, FreesUnderTransport),
    FreesUnderTransportWhatIsOfNoUse,
    *(LeaseFromTheAnswer, WaitsForEver, ExpectsForEver, FreesWhatItNeverHad, NeverStopsTheTransport),
]


def near_the_usual_way(world: World) -> None:
    """The worlds of the right machines, with those of `world` in their place as far as they go that way."""
    way = [world]
    for name in USUAL_WAY[:12]:
        following = [after for move, after in way[-1].moves() if move.startswith(name)]
        way += following[:1]
    Explorer().explore(way, depth=4)


@pytest.mark.parametrize("mutant", GIVER_MUTANTS)
def test_the_explorer_finds_a_broken_giver(mutant: type[GiverTransfer]) -> None:
    with pytest.raises(AssertionError):
        near_the_usual_way(World(giver=mutant(LEASE)))


@pytest.mark.parametrize("mutant", TAKER_MUTANTS)
def test_the_explorer_finds_a_broken_taker(mutant: type[TakerTransfer]) -> None:
    with pytest.raises(AssertionError):
        near_the_usual_way(World(taker=mutant(LEASE, STALL, DEADLINE)))
