"""What the prefill role tells the giver as a prompt is computed and ends, however it ends."""

from __future__ import annotations

from typing import Any, cast

import pytest

from core.errors import InternalError
from core.types import Finish, FinishReason, Request, SamplingParams
from core.wire import Prefill
from engine.engine import Engine
from engine.kv_layout import KVLayout
from engine.schedule import Chunk, Opened
from engine.scheduler import SequenceUpdate
from engine.sequence import Sequence, Status
from kv_transfer.giver import Giver
from kv_transfer.messages import SequenceState
from kv_transfer.pieces import PIECE_BYTES, Frontier
from prefill_workers.worker import PrefillWorker

REQUEST = Request(request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4), deadline=0.0)
LAYOUT = KVLayout(num_layers=8, num_kv_heads=2, head_size=64, dtype="bfloat16", block_size=16, fingerprint="tiny")
LAYER_BYTES = 2 * 2 * 64 * 2
"""Of one token."""


class Recorder:
    """Takes calls down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, *arguments, *named.items()))


class Harness:
    def __init__(self) -> None:
        self.engine, self.giver = Recorder(), Recorder()
        self.worker = PrefillWorker(cast("Engine", self.engine), cast("Giver", self.giver), LAYOUT)
        self.worker.prefill(Prefill(REQUEST, transfer_id="t"))
        self.sequence = Sequence(REQUEST, hold_after_prefill=True)
        self.engine.calls.clear()

    def admit(self) -> None:
        self.worker.opened(Opened(self.sequence, [4, 5], 3, 2))

    def first_token(self, finish: Finish | None = None) -> None:
        if finish is None:
            self.sequence.status = Status.HELD
        self.worker.on_update(SequenceUpdate(sequence=self.sequence, token_ids=[7], index=0, finish=finish))


def test_the_giver_gets_the_blocks_when_the_engine_has_them_and_hears_what_is_written() -> None:
    h = Harness()
    h.admit()
    h.worker.computed([Chunk(h.sequence, 2, 1, samples=False)])
    h.first_token()
    assert h.giver.calls == [
        ("open", "t", [4, 5], 3),
        ("written", "t", Frontier(2)),
        ("written", "t", Frontier(3), None),
        ("complete", "t", SequenceState(token_ids=[7])),
    ]


@pytest.mark.parametrize(
    ("pieces_per_layer", "last", "told"),
    [
        (0.01, True, [8]),
        (0.25, False, [4, 8]),
        (0.25, True, [1, 5, 7, 8]),
        (0.4, False, [2, 4, 6, 8]),
        (0.4, True, [1, 3, 5, 7, 8]),
        (3, True, [*range(1, 9)]),
    ],
)
def test_layers_are_told_when_they_make_a_piece_and_the_last_always(
    pieces_per_layer: float, last: bool, told: list[int]
) -> None:
    h = Harness()
    num_tokens = int(pieces_per_layer * PIECE_BYTES / LAYER_BYTES)
    chunk = Chunk(h.sequence, 100, num_tokens, samples=last)
    notes = [note for layer in range(8) for note in h.worker.notes([chunk], layer)]
    expected = [Frontier(100, num_tokens, layers) for layers in told[:-1]] + [Frontier(100 + num_tokens)]
    assert notes == [("r", frontier) for frontier in expected]


def test_notes_of_a_prompt_that_was_aborted_are_dropped() -> None:
    h = Harness()
    h.admit()
    h.worker.abort("r")
    h.giver.calls.clear()
    h.worker.written([("r", Frontier(3))])
    assert h.giver.calls == []


def test_a_prompt_that_ends_with_its_first_token_is_withdrawn_as_finished() -> None:
    h = Harness()
    h.admit()
    h.giver.calls.clear()
    h.first_token(Finish(reason=FinishReason.STOP))
    assert h.giver.calls == [("withdraw", "t", "ended here (stop)", ("finished", True))]
    assert h.worker.released("t") == "r"
    assert h.engine.calls == [("release", "r")]


@pytest.mark.parametrize("held", [False, True])
def test_the_decode_side_has_to_speak_up_when_a_prompt_fails_as_nobody_else_may_live_to(held: bool) -> None:
    h = Harness()
    h.admit()
    if held:
        h.first_token()
    h.worker.on_update(SequenceUpdate(h.sequence, [], 1, finish=Finish.from_error(InternalError("step failed"))))
    assert h.giver.calls[-1] == ("withdraw", "t", "ended here (error)", ("finished", False))


@pytest.mark.parametrize("state", ["waiting", "computed", "held"])
def test_an_abort_stops_the_prompt_and_is_withdrawn_as_unfinished(state: str) -> None:
    h = Harness()
    if state != "waiting":
        h.admit()
    if state == "held":
        h.first_token()
    h.worker.abort("r")
    assert h.giver.calls[-1] == ("withdraw", "t", "aborted", ("finished", False))
    assert h.engine.calls == [("abort", "r")], "its blocks are the giver's to free"
    h.worker.abort("r")
    assert len(h.engine.calls) == 1


def test_blocks_that_come_after_an_abort_go_straight_back() -> None:
    h = Harness()
    h.worker.abort("r")
    h.admit()
    assert h.engine.calls == [("abort", "r"), ("release", "r")]
    assert h.giver.calls == [("withdraw", "t", "aborted", ("finished", False))]


@pytest.mark.parametrize("held", [False, True])
def test_blocks_go_back_when_the_giver_is_done_with_them(held: bool) -> None:
    h = Harness()
    h.admit()
    if held:
        h.first_token()
    assert h.worker.released("t") == "r"
    assert h.engine.calls == [("release", "r")]
    assert h.worker.released("t") is None
