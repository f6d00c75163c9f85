"""What drafters know of a prompt travels with its KV: drafts after a hand-off are those of a worker that did it all."""

from __future__ import annotations

import contextlib
import queue
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from core.draft_state import DraftState, DraftStates, PackedTensor
from core.errors import TransferError
from core.types import Grammar, GrammarKind, Request, SamplingParams
from core.wire import decoder, encode
from engine.block_manager import BlockManager
from engine.drafts import Candidate, Draft
from engine.engine import Engine, Report
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence as EngineSequence
from engine.sequence import Status
from engine.speculator import Speculator
from engine.structured.grammars import Grammars
from kv_transfer.messages import SequenceState
from speculation.drafters.registry import DRAFTERS, find_drafter
from speculation.in_batch import InBatch
from speculation.make import make_observer, make_speculator
from speculation.packing import expect, packed, unpacked
from speculation.rules.registry import DEFAULT_RULE, RULES
from speculation.settings import Settings
from tests.engine.driver import tokens
from tests.speculation.characters import save_tokenizer

BLOCKS, BLOCK_SIZE, BUDGET, WAIT_S = 48, 8, 8, 60
RECYCLERS = ("hybrid", "token_recycling", "aded")
NAMES = [*sorted(kind.name for kind in DRAFTERS.values() if not kind.takes_weights), "draft_model"]

Round = tuple[int, int]
"""Tokens drafted and accepted."""
Story = tuple[list[tuple[list[int], list[Round]]], list[list[int]]]
"""Of each request its output and its rounds; and of all rounds the tokens that were drafted."""


@dataclass
class Worker:
    """An engine and its cache."""

    runner: ModelRunner
    speculator: Speculator | None
    grammars: Grammars | None = None
    reports: queue.Queue[Report] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=200)
        self.blocks = BlockManager(BLOCKS, BLOCK_SIZE, enable_prefix_caching=False)
        scheduler = Scheduler(config, self.blocks)
        self.engine = Engine(self.runner, scheduler, self.reports.put, self.grammars, speculator=self.speculator)
        self.engine.start()

    def to_the_end(self) -> tuple[list[int], list[Round]]:
        """Of the one sequence: its tokens, and its rounds but the step that computed the prompt."""
        found, rounds = list[int](), list[Round]()
        while True:
            for update in self.reports.get(timeout=WAIT_S).updates:
                found += update.token_ids
                if update.index:
                    rounds.append((update.num_drafted_tokens, update.num_accepted_tokens))
                if update.finish is not None:
                    return found, rounds


@pytest.fixture(autouse=True, scope="module")
def learning_takes_what_it_takes() -> Iterator[None]:
    """What is learned from plain steps is a matter of time otherwise, and the drafts with it; so is who stalls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("speculation.crew.PATIENCE_STEPS", 10_000)
        patch.setattr("speculation.allowance.SHARE", 1e9)
        yield


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="module")
def draft(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(seed=1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def runners(folder: Path) -> list[ModelRunner]:
    return [
        ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=BLOCKS, block_size=BLOCK_SIZE)
        for _ in range(2)
    ]


def settings(name: str, draft: Path, rule: str = DEFAULT_RULE) -> Settings:
    weights = {name: draft} if name == "draft_model" else {}
    return Settings(
        drafters=(name,),
        max_budget=BUDGET,
        max_memory_bytes=8 << 20,
        rule=rule,
        controller="fixed",
        weights=weights,
    )


def requests() -> list[Request]:
    """Prompts of several chunks that repeat themselves in part, greedy and drawn, with all that can be asked for."""
    grammar = Grammar(GrammarKind.REGEX, "([a-p]{1,3}[0-9A-P]){2,20}")
    given: list[tuple[list[int], dict[str, Any]]] = [
        (tokens(30, seed=1) * 2, {}),
        (tokens(23, seed=2) + tokens(30, seed=1), {"temperature": 0.8}),
        (tokens(5, seed=3), {"logprobs": 2, "stop_token_ids": tuple(range(0, 97, 9))}),
        (tokens(11, seed=4) * 3, {"repetition_penalty": 1.2, "logit_bias": {7: 2.0}}),
        (tokens(11, seed=4) * 3, {"temperature": 0.8, "frequency_penalty": 0.5, "top_k": 20}),
        (tokens(13, seed=5) * 2, {"grammar": grammar}),
        (tokens(13, seed=5) * 2, {"grammar": grammar, "temperature": 1.0, "presence_penalty": 0.5}),
    ]
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(**({"max_tokens": 30, "temperature": 0.0, "seed": index} | asked)),
            deadline=0.0,
        )
        for index, (prompt, asked) in enumerate(given)
    ]


@contextlib.contextmanager
def workers(runners: Sequence[ModelRunner], *speculators: Speculator | None) -> Iterator[list[Worker]]:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        grammars = [Grammars(Path(folder), runner.config.vocab_size) for runner in runners]
        made = [Worker(*parts) for parts in zip(runners, speculators, grammars, strict=False)]
        yield from _running(made)


def _running(made: list[Worker]) -> Iterator[list[Worker]]:
    try:
        yield made
    finally:
        for worker in made:
            worker.engine._commands.put(None)
            worker.engine._thread.join(WAIT_S)


def watched(speculator: InBatch, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of its drafts, as they come."""
    drafted: list[list[int]] = []
    propose = speculator.propose

    def watching(candidates: Sequence[Candidate], num_other_tokens: int) -> Sequence[Draft | None] | None:
        drafts = propose(candidates, num_other_tokens)
        drafted.append([token for draft in drafts or () if draft is not None for token in draft.token_ids.tolist()])
        return drafts

    monkeypatch.setattr(speculator, "propose", watching)
    return drafted


def colocated(runner: ModelRunner, speculator: InBatch, monkeypatch: pytest.MonkeyPatch) -> Story:
    found, drafted = [], watched(speculator, monkeypatch)
    with workers([runner], speculator) as (both,):
        for request in requests():
            both.engine.add(EngineSequence(request))
            found.append(both.to_the_end())
    return found, drafted


def prefilled(worker: Worker, request: Request) -> tuple[list[int], SequenceState]:
    """The blocks, and the state as it arrives."""
    worker.engine.add(EngineSequence(request, hold_after_prefill=True))
    blocks: list[int] = []
    while True:
        report = worker.reports.get(timeout=WAIT_S)
        blocks += [block for opened in report.opened for block in opened.block_ids]
        for update in report.updates:
            assert update.sequence.status is Status.HELD
            state = SequenceState(token_ids=update.token_ids, draft_states=update.draft_states)
            return blocks, decoder(SequenceState).decode(encode(state))


def handed_over(
    runners: Sequence[ModelRunner],
    observer: Speculator | None,
    speculator: InBatch,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[DraftStates], DraftStates] = lambda states: states,
) -> Story:
    found, drafted = [], watched(speculator, monkeypatch)
    with workers(runners, observer, speculator) as (giver, taker):
        for request in requests():
            theirs, state = prefilled(giver, request)
            taker.engine.reserve(EngineSequence(request))
            (sequence,) = taker.reports.get(timeout=WAIT_S).granted
            taker.runner.pool.data[:, :, sequence.block_table] = giver.runner.pool.data[:, :, theirs]
            giver.engine.release(request.request_id)
            taker.engine.join(request.request_id, state.token_ids, draft_states=change(state.draft_states))
            rest, rounds = taker.to_the_end()
            found.append((state.token_ids + rest, rounds))
        assert not speculator.counters.switched_off
    assert (giver.blocks.num_free, taker.blocks.num_free) == (BLOCKS, BLOCKS)
    return found, drafted


@pytest.mark.parametrize("name", NAMES)
def test_drafts_after_a_hand_off_are_those_of_a_worker_that_did_it_all(
    runners: list[ModelRunner], draft: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round: the same tokens drafted, and as many accepted."""
    chosen = settings(name, draft)
    together = colocated(runners[0], make_speculator(chosen, runners[0], 4), monkeypatch)
    observer = make_observer(chosen, runners[0], 4)
    assert (observer is not None) is (name in RECYCLERS)
    apart = handed_over(runners, observer, make_speculator(chosen, runners[1], 4), monkeypatch)
    assert apart == together
    assert sum(accepted for _, rounds in apart[0] for _, accepted in rounds) > 0


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule.name)
        for name in NAMES
        for rule in RULES.values()
        if rule.name != DEFAULT_RULE and rule.laws & set(find_drafter(name).laws)
    ],
)
def test_so_are_those_of_the_other_rules(
    runners: list[ModelRunner], draft: Path, name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the random numbers of a rule, which are those of the request and the position."""
    chosen = settings(name, draft, rule)
    together = colocated(runners[0], make_speculator(chosen, runners[0], 4), monkeypatch)
    observer = make_observer(chosen, runners[0], 4)
    assert handed_over(runners, observer, make_speculator(chosen, runners[1], 4), monkeypatch) == together
    assert sum(accepted for _, rounds in together[0] for _, accepted in rounds) > 0


@pytest.mark.parametrize("name", RECYCLERS)
def test_without_what_was_handed_over_drafts_would_be_others(
    runners: list[ModelRunner], draft: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is what the test above is to notice."""
    chosen = settings(name, draft)
    together = colocated(runners[0], make_speculator(chosen, runners[0], 4), monkeypatch)
    apart = handed_over(runners, None, make_speculator(chosen, runners[1], 4), monkeypatch)
    assert [output for output, _ in apart[0]] == [output for output, _ in together[0]]
    assert apart[1] != together[1]


def test_a_worker_that_decodes_hands_over_as_well(
    runners: list[ModelRunner], draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was given another role keeps its drafters."""
    chosen = settings("token_recycling", draft)
    seen: list[DraftStates] = []

    def look(states: DraftStates) -> DraftStates:
        seen.append(states)
        return states

    giver, taker = (make_speculator(chosen, runner, 4) for runner in runners)
    handed_over(runners, giver, taker, monkeypatch, look)
    assert [list(states) for states in seen] == [["token_recycling"]] * len(requests())


def tensor(dtype: torch.dtype, *values: float) -> PackedTensor:
    return packed("", {"x": torch.tensor([list(values)], dtype=dtype)}).tensors["x"]


def given(states: DraftStates, runners: list[ModelRunner], draft: Path, monkeypatch: pytest.MonkeyPatch) -> Story:
    speculator = make_speculator(settings("token_recycling", draft), runners[1], 4)
    return handed_over(runners, None, speculator, monkeypatch, lambda _: states)


@pytest.fixture(scope="module")
def alone(runners: list[ModelRunner], draft: Path) -> Story:
    """Without a state."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return given({}, runners, draft, monkeypatch)


TOP = 8
GOOD = {
    "index": PackedTensor("int64", (1,), (4).to_bytes(8, "little")),
    "top_ids": tensor(torch.int64, *range(TOP)),
    "top_logprobs": tensor(torch.float32, *[-2.0] * TOP),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": PackedTensor("int64", (1,), (500).to_bytes(8, "little"))},
        {"index": PackedTensor("int64", (1,), b"\xff" * 8)},
        {"index": PackedTensor("int64", (2,), bytes(8))},
        {"top_ids": tensor(torch.int64, *range(3))},
        {"top_ids": tensor(torch.int64, *[10**6] * TOP)},
        {"top_ids": tensor(torch.int64, *[-1] * TOP)},
        {"top_ids": tensor(torch.float32, *range(TOP))},
        {"top_logprobs": tensor(torch.float32, *[float("nan")] * TOP)},
        {"top_logprobs": tensor(torch.float32, *[3.0] * TOP)},
        {"top_logprobs": PackedTensor("float32", (1, TOP), bytes(3))},
    ],
)
def test_a_state_that_fits_nothing_is_left_aside(
    runners: list[ModelRunner],
    draft: Path,
    wrong: dict[str, PackedTensor],
    alone: Story,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other worker's word changes no draft then, and switches nobody off."""
    states = {"token_recycling": DraftState("", GOOD | wrong), "nobody": DraftState("", GOOD)}
    assert given(states, runners, draft, monkeypatch) == alone


def test_a_state_that_fits_is_not(
    runners: list[ModelRunner], draft: Path, alone: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"token_recycling": DraftState("", GOOD)}
    assert given(states, runners, draft, monkeypatch) != alone


def test_a_state_of_another_version_is_left_aside(
    runners: list[ModelRunner], draft: Path, alone: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"token_recycling": DraftState("another", GOOD)}
    assert given(states, runners, draft, monkeypatch) == alone


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (1,)])
def test_tensors_arrive_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(packed("v", {"x": sent})), type=DraftState)
    assert torch.equal(unpacked(state)["x"], sent)
    assert expect(unpacked(state), "x", dtype, *shape).dtype == dtype
    with pytest.raises(TransferError, match="no y"):
        expect(unpacked(state), "y", dtype)


def test_what_is_no_tensor_is_refused_by_the_wire() -> None:
    for bad in (["int64", [-1], b""], ["complex64", [1], b"12345678"], ["int64", [1], 5]):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(bad), type=PackedTensor)
