"""What the prefill role tells the giver when a prompt ends, however it ends."""

from __future__ import annotations

from typing import Any, cast

import pytest

from core.types import Finish, FinishReason, Request, SamplingParams
from core.wire import Prefill
from engine.engine import Engine
from engine.scheduler import SequenceUpdate
from engine.sequence import Sequence, Status
from kv_transfer.giver import Giver
from prefill_workers.worker import PrefillWorker

REQUEST = Request(request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4), deadline=0.0)


class Recorder:
    """Takes calls down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, *arguments, *named.items()))


class Harness:
    def __init__(self) -> None:
        self.engine, self.giver = Recorder(), Recorder()
        self.worker = PrefillWorker(cast("Engine", self.engine), cast("Giver", self.giver))
        self.worker.prefill(Prefill(REQUEST, transfer_id="t"))
        self.engine.calls.clear()

    def first_token(self, finish: Finish | None = None) -> None:
        sequence = Sequence(REQUEST, hold_after_prefill=True)
        if finish is None:
            sequence.status = Status.HELD
        self.worker.on_update(SequenceUpdate(sequence=sequence, token_ids=[7], index=0, finish=finish))


def test_a_prompt_that_ends_with_its_first_token_is_withdrawn_as_finished() -> None:
    h = Harness()
    h.first_token(Finish(reason=FinishReason.STOP))
    assert h.giver.calls == [("withdraw", "t", "ended at the first token (stop)", ("finished", True))]


@pytest.mark.parametrize("held", [False, True])
def test_an_abort_is_withdrawn_as_unfinished(held: bool) -> None:
    h = Harness()
    if held:
        h.first_token()
    h.worker.abort("r")
    assert h.giver.calls[-1] == ("withdraw", "t", "aborted", ("finished", False))
    assert h.engine.calls == ([] if held else [("abort", "r")]), "held blocks are the giver's to free"


def test_held_blocks_go_back_when_the_giver_is_done_with_them() -> None:
    h = Harness()
    h.first_token()
    assert [call[:2] for call in h.giver.calls] == [("offer", "t")]
    assert h.worker.released("t") == "r"
    assert h.engine.calls == [("release", "r")]
