"""The way of one request, event by event, and every way it can go."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cluster.dispatch import MAX_ATTEMPTS, Deliver, Dispatch, Instruction, Reroute, Send
from core.errors import InternalError, InvalidRequest, Overloaded, Undrawable
from core.types import Finish, FinishReason, Request, SamplingParams, TokenDelta
from core.wire import Abort, Generate, Opened, Prefill, Receive

STOP = Finish(reason=FinishReason.STOP)


def request() -> Request:
    return Request(
        request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=3), deadline=float("inf")
    )


def delta(attempt: str, index: int, *tokens: int, finish: Finish | None = None) -> TokenDelta:
    return TokenDelta(request_id=attempt, index=index, token_ids=list(tokens), finish=finish)


def delivered(instructions: list[Instruction]) -> list[int]:
    return [t for i in instructions if isinstance(i, Deliver) for t in i.delta.token_ids]


def disaggregated() -> Dispatch:
    dispatch = Dispatch(request())
    dispatch.start("d", "p", "host:1")
    return dispatch


def test_the_decode_side_is_asked_first_so_that_no_offer_is_made_to_nobody() -> None:
    receive, prefill = Dispatch(request()).start("d", "p", "host:1", within_s=5)
    assert isinstance(receive, Send)
    assert isinstance(receive.message, Receive)
    assert (receive.message.prefill_address, receive.message.within_s) == ("host:1", 5)
    assert isinstance(prefill, Send)
    assert isinstance(prefill.message, Prefill)
    assert prefill.message.transfer_id == receive.message.transfer_id


def test_the_decode_side_hears_that_the_prompt_has_its_blocks() -> None:
    dispatch = disaggregated()
    assert dispatch.on_opened("r.0") == [Send("d", Opened("r.0"))]
    dispatch.on_worker_lost("d")
    dispatch.start("d2", "p", "host:1")
    assert dispatch.on_opened("r.0") == []
    assert dispatch.on_opened("r.1") == [Send("d2", Opened("r.1"))]


def test_tokens_of_the_two_sides_are_delivered_in_order() -> None:
    dispatch = disaggregated()
    assert dispatch.on_delta(delta("r.0", 1, 11), "w") == []
    assert delivered(dispatch.on_delta(delta("r.0", 0, 10), "w")) == [10, 11]
    last = dispatch.on_delta(delta("r.0", 2, 12, finish=STOP), "w")
    assert delivered(last) == [12]
    assert [i.message for i in last if isinstance(i, Send)] == [Abort("r.0"), Abort("r.0")]
    assert dispatch.ended


def test_the_client_sees_its_own_request_id() -> None:
    dispatch = disaggregated()
    (deliver,) = dispatch.on_delta(delta("r.0", 0, 10), "w")
    assert isinstance(deliver, Deliver)
    assert deliver.delta.request_id == "r"


def test_a_lost_decode_worker_means_another_attempt_that_starts_from_what_was_delivered() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 0, 10), "w")
    assert dispatch.on_worker_lost("d") == [Send("p", Abort("r.0")), Reroute()]
    (send,) = dispatch.start("d2", None)
    assert isinstance(send, Send)
    assert isinstance(send.message, Generate)
    assert send.message.request.emitted_token_ids == [10]
    assert delivered(dispatch.on_delta(delta("r.1", 1, 11, finish=STOP), "w")) == [11]


def test_what_an_abandoned_attempt_still_says_is_dropped() -> None:
    dispatch = disaggregated()
    dispatch.on_worker_lost("d")
    dispatch.start("d2", None)
    assert dispatch.on_delta(delta("r.0", 0, 10), "w") == []


def test_a_prefill_worker_may_die_after_its_first_token_is_out() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 0, 10), "w")
    assert dispatch.on_worker_lost("p") == []
    assert delivered(dispatch.on_delta(delta("r.0", 1, 11), "w")) == [11]


def test_a_prefill_worker_that_dies_with_the_first_token_costs_an_attempt() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 1, 11), "w")
    assert dispatch.on_worker_lost("p") == [Send("d", Abort("r.0")), Reroute()]


def test_a_failed_hand_off_is_tried_with_another_prefill_worker() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 0, 10), "w")
    assert Reroute() in dispatch.on_handoff_failed("r.0")
    assert dispatch.avoid == {"p"}


def test_a_hand_off_that_failed_twice_is_prefilled_on_the_decode_worker() -> None:
    dispatch = disaggregated()
    dispatch.on_handoff_failed("r.0")
    dispatch.start("d2", "p2", "host:2")
    assert Reroute(local_to="d2") in dispatch.on_handoff_failed("r.1")


def test_a_mistake_of_the_caller_is_not_retried() -> None:
    dispatch = disaggregated()
    bad = Finish.from_error(InvalidRequest("too long"))
    assert Reroute() not in dispatch.on_delta(delta("r.0", 0, finish=bad), "w")
    assert dispatch.ended


def test_a_fault_of_ours_is_retried_a_bounded_number_of_times() -> None:
    dispatch = Dispatch(request())
    broken = Finish.from_error(InternalError("step failed"))
    for attempt in range(MAX_ATTEMPTS):
        assert not dispatch.ended
        dispatch.start("d", None)
        last = dispatch.on_delta(delta(f"r.{attempt}", 0, finish=broken), "w")
    assert dispatch.ended
    assert [i.delta.finish for i in last if isinstance(i, Deliver)] == [broken]


def test_workers_that_are_stopped_as_planned_cost_a_request_none_of_its_attempts() -> None:
    """A long answer outlives any number of changes of the layout."""
    dispatch = Dispatch(request())
    for _ in range(2 * MAX_ATTEMPTS):
        dispatch.start("d", None)
        assert dispatch.on_worker_lost("d", left=True) == [Reroute()]
    for attempt in range(MAX_ATTEMPTS):
        assert not dispatch.ended
        dispatch.start("d", None)
        last = dispatch.on_worker_lost("d")
        assert (Reroute() in last) == (attempt < MAX_ATTEMPTS - 1)
    assert [i.delta.finish and i.delta.finish.message for i in last if isinstance(i, Deliver)] == [
        f"{MAX_ATTEMPTS} attempts failed; retry later"
    ]


@dataclass
class World:
    """Everything that can happen to one request, driven by choices; checks the promises after each event."""

    dispatch: Dispatch = field(default_factory=lambda: Dispatch(request()))
    tokens: list[int] = field(default_factory=list)
    finishes: int = 0
    owed: set[tuple[str, str]] = field(default_factory=set)
    """(worker, attempt) that were asked and not yet told to forget."""
    reroute: Reroute | None = None
    log: list[str] = field(default_factory=list)

    def carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(worker, Abort(attempt)):
                    self.owed.discard((worker, attempt))
                case Send(worker, Opened(attempt)):
                    assert (worker, attempt) in self.owed, self.log
                case Send(worker, message):
                    self.owed.add((worker, message.request.request_id))
                case Deliver(delta):
                    assert self.finishes == 0, self.log
                    assert delta.index == len(self.tokens), self.log
                    self.tokens += delta.token_ids
                    self.finishes += delta.finish is not None
                case Reroute():
                    self.reroute = instruction

    def events(self) -> list[str]:
        if self.reroute is not None:
            return ["start", "start-local", "refuse"]
        attempt = self.dispatch.attempt_id
        n = len(self.tokens)
        return [
            f"opened {attempt}",
            f"delta {attempt} {n}",
            f"delta {attempt} {n + 1}",
            f"finish {attempt} {n}",
            f"error {attempt} {n}",
            f"handoff-failed {attempt}",
            "delta r.0 0",
            "lost p",
            "lost d",
            "left d",
            "cancel",
            "deadline",
        ]

    def happen(self, event: str) -> None:
        self.log.append(event)
        name, *args = event.split()
        d = self.dispatch
        if name.startswith("start") or name == "refuse":
            self.reroute = None
        match name, args:
            case "start", []:
                self.carry_out(d.start("d", "p", "host:1"))
            case "start-local", []:
                self.carry_out(d.start("d", None))
            case "refuse", []:
                self.carry_out(d.refuse(Overloaded("full")))
            case "opened", [attempt]:
                self.carry_out(d.on_opened(attempt))
            case "delta", [attempt, index]:
                self.carry_out(d.on_delta(delta(attempt, int(index), 7), "w"))
            case "finish", [attempt, index]:
                self.carry_out(d.on_delta(delta(attempt, int(index), 7, finish=STOP), "w"))
            case "error", [attempt, index]:
                self.carry_out(
                    d.on_delta(delta(attempt, int(index), finish=Finish.from_error(InternalError("x"))), "w")
                )
            case "handoff-failed", [attempt]:
                self.carry_out(d.on_handoff_failed(attempt))
            case "lost", [worker]:
                self.owed = {(w, a) for w, a in self.owed if w != worker}
                self.carry_out(d.on_worker_lost(worker))
            case "left", [worker]:
                self.owed = {(w, a) for w, a in self.owed if w != worker}
                self.carry_out(d.on_worker_lost(worker, left=True))
            case "cancel", []:
                self.carry_out(d.on_cancel())
            case "deadline", []:
                self.carry_out(d.on_deadline())


@pytest.mark.parametrize("first", ["start", "start-local"])
def test_every_interleaving_ends_once_and_leaves_no_worker_holding_the_request(first: str) -> None:
    """Exhaustive to five events after the first; every prefix is closed by the client going away."""

    def explore(path: list[str]) -> int:
        world = World()
        for event in path:
            world.happen(event)
        count = 1
        if len(path) <= 5 and not world.dispatch.ended:
            count += sum(explore([*path, event]) for event in world.events())
        world.happen("cancel")
        assert world.finishes == 1, world.log
        assert world.owed == set(), world.log
        return count

    assert explore([first]) > 5_000


def test_a_worker_that_failed_is_not_asked_again_if_there_is_another() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 0, finish=Finish.from_error(InternalError("step failed"))), "p")
    assert dispatch.avoid == {"p"}


def test_what_another_worker_would_not_do_better_is_not_retried() -> None:
    dispatch = disaggregated()
    dispatch.on_delta(delta("r.0", 0, finish=Finish.from_error(Undrawable("no law"))), "p")
    assert dispatch.ended
