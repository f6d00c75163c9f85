"""Logprobs of a prompt's tokens, through the engine's scheduler and a real runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.types import FinishReason, PromptLogprobs, Request, SamplingParams
from engine import scoring
from engine.batching import build_batch
from engine.block_manager import BlockManager
from engine.runner import ModelRunner
from engine.scheduler import Scheduler, SchedulerConfig, SequenceUpdate
from engine.sequence import Sequence as EngineSequence
from tests.engine.driver import TINY, tokens

VOCAB = TINY["vocab_size"]
NUM_BLOCKS = 40
ROUNDING = 5e-5
"""By how much two logprobs may be nearer or further apart than in Transformers: each is off by 1.6e-5 at the most."""
Reference = Callable[[Path, Sequence[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=NUM_BLOCKS, block_size=8)


def scheduler(step_tokens: int = 64, num_blocks: int = NUM_BLOCKS) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=step_tokens, max_model_len=256)
    return Scheduler(config, BlockManager(num_blocks, 8))


def sequence(
    name: str, prompt: list[int], num_top: int | None = 3, hold: bool = False, **sampling: int
) -> EngineSequence:
    params = SamplingParams(**({"max_tokens": 2} | sampling), temperature=0.0, prompt_logprobs=num_top)
    request = Request(request_id=name, prompt_token_ids=prompt, sampling=params, deadline=0)
    return EngineSequence(request, hold_after_prefill=hold)


def run(runner: ModelRunner, scheduler: Scheduler, *sequences: EngineSequence) -> dict[str, list[SequenceUpdate]]:
    """All of them to their ends; the updates of each."""
    updates: dict[str, list[SequenceUpdate]] = {s.request_id: [] for s in sequences}
    for one in sequences:
        scheduler.add(one)
    while scheduler.has_work:
        schedule = scheduler.schedule()
        output = runner.submit(build_batch(schedule)).result()
        found = scheduler.update(schedule, output.token_ids.tolist(), output.logprobs, output.prompt_logprobs)
        for update in found:
            updates[update.sequence.request_id].append(update)
    return updates


def arrays(scores: PromptLogprobs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """logprobs, ranks, ids and logprobs of the top."""
    return (
        np.frombuffer(scores.logprobs, "<f4"),
        np.frombuffer(scores.ranks, "<i4"),
        np.frombuffer(scores.top_ids, "<i4").reshape(-1, scores.num_top),
        np.frombuffer(scores.top_logprobs, "<f4").reshape(-1, scores.num_top),
    )


def check(scores: PromptLogprobs | None, prompt: list[int], logits: torch.Tensor) -> None:
    """Against the logits of Transformers."""
    assert scores is not None
    law = logits[:-1].log_softmax(-1).numpy()
    own, ranks, top_ids, top = arrays(scores)
    targets = np.array(prompt[1:])
    expected = np.take_along_axis(law, targets[:, None], 1)
    np.testing.assert_allclose(own, expected[:, 0], atol=1e-3)
    assert len(own) == len(prompt) - 1
    surely, perhaps = ((law > expected + margin).sum(1) for margin in (ROUNDING, -ROUNDING))  # and perhaps itself
    assert (ranks > surely).all()
    assert (ranks <= perhaps).all()
    at_top = np.take_along_axis(law, top_ids.astype(np.int64), 1)
    np.testing.assert_allclose(at_top, -np.sort(-law, axis=1)[:, : scores.num_top], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(top, at_top, atol=1e-3)
    assert all(len(set(row)) == len(row) for row in top_ids.tolist())


@pytest.mark.parametrize("step_tokens", [8, 17, 64, 256])
def test_they_are_those_of_transformers_however_the_prompt_is_cut(
    runner: ModelRunner, folder: Path, reference: Reference, step_tokens: int
) -> None:
    prompts = [tokens(n, seed=n) for n in (2, 30, 61)]
    updates = run(runner, scheduler(step_tokens), *(sequence(str(i), p) for i, p in enumerate(prompts)))
    for index, prompt in enumerate(prompts):
        first, *later = updates[str(index)]
        check(first.prompt_logprobs, prompt, reference(folder, prompt))
        assert [u.prompt_logprobs for u in later] == [None]


def test_they_are_computed_in_parts_of_bounded_size(
    runner: ModelRunner, folder: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sizes = tokens(50), []
    monkeypatch.setattr(scoring, "MAX_LOGIT_BYTES", 7 * 4 * VOCAB)
    whole = runner._model.logits  # type: ignore[union-attr]
    monkeypatch.setattr(runner._model, "logits", lambda hidden: sizes.append(len(hidden)) or whole(hidden))
    updates = run(runner, scheduler(), sequence("a", prompt))
    check(updates["a"][0].prompt_logprobs, prompt, reference(folder, prompt))
    assert max(sizes) == 7


def test_a_prompt_that_the_prefix_cache_knows_is_computed_whole_and_not_counted(
    runner: ModelRunner, folder: Path, reference: Reference
) -> None:
    prompt, one = tokens(50), scheduler()
    run(runner, one, sequence("a", prompt, None))
    queries = one.blocks.num_queried_tokens
    updates = run(runner, one, sequence("b", prompt))
    check(updates["b"][0].prompt_logprobs, prompt, reference(folder, prompt))
    assert updates["b"][0].num_cached_tokens == 0
    assert one.blocks.num_queried_tokens == queries
    cached = run(runner, one, sequence("c", prompt, None))["c"][0]
    assert cached.num_cached_tokens == 48


def test_a_reservation_reads_the_prefix_cache_because_the_other_worker_reports() -> None:
    one = scheduler()
    one.reserve(sequence("a", tokens(50), max_tokens=3))
    one.schedule()
    one.join("a", [7])
    again = sequence("b", tokens(50), max_tokens=3)
    one.reserve(again)
    one.schedule()
    assert again.num_computed_tokens == 48
    one.join("b", [7])
    assert all(not chunk.num_scored for chunk in one.schedule().chunks)


def test_the_prefill_role_reports_them_with_the_first_token(
    runner: ModelRunner, folder: Path, reference: Reference
) -> None:
    prompt = tokens(40)
    (update,) = run(runner, scheduler(16), sequence("a", prompt, hold=True))["a"]
    check(update.prompt_logprobs, prompt, reference(folder, prompt))


def test_without_output_the_prompt_is_scored_and_nothing_drawn(
    runner: ModelRunner, folder: Path, reference: Reference
) -> None:
    prompt, one = tokens(256), scheduler()  # as long as the context: no room is needed after it
    (update,) = run(runner, one, sequence("a", prompt, max_tokens=0))["a"]
    check(update.prompt_logprobs, prompt, reference(folder, prompt))
    assert (update.token_ids, update.index) == ([], 0)
    assert update.finish is not None
    assert update.finish.reason is FinishReason.LENGTH
    assert one.blocks.num_free == NUM_BLOCKS


def test_a_prompt_of_one_token_has_none(runner: ModelRunner) -> None:
    update = run(runner, scheduler(), sequence("a", [5], max_tokens=0))["a"][0]
    assert update.prompt_logprobs is None


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=2, max_size=6),
    step_tokens=st.integers(8, 70),
    seed=st.integers(0, 2**16),
)
def test_they_come_once_and_whole_when_blocks_run_out(
    runner: ModelRunner,
    folder: Path,
    reference: Reference,
    lengths: list[tuple[int, bool]],
    step_tokens: int,
    seed: int,
) -> None:
    one = scheduler(step_tokens, num_blocks=11)
    prompts = [tokens(n, seed + i) for i, (n, _) in enumerate(lengths)]
    asked = [
        sequence(str(i), p, 2 if asks else None, max_tokens=20)
        for i, (p, (_, asks)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    updates = run(runner, one, *asked)
    for index, (prompt, (_, asks)) in enumerate(zip(prompts, lengths, strict=True)):
        reports = [u.prompt_logprobs for u in updates[str(index)] if u.prompt_logprobs is not None]
        assert len(reports) == (asks and len(prompt) > 1)
        for report in reports:
            check(report, prompt, reference(folder, prompt))
