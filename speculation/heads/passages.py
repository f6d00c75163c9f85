"""What heads are trained on: texts that the target writes itself, with the hidden states and laws of that very pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from core.types import Request, SamplingParams
from engine.batching import build_batch
from engine.block_manager import BlockManager
from engine.runner import ModelRunner
from engine.schedule import Schedule, SchedulerConfig
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput
from speculation.rounds import Needs
from speculation.seen import Step, observed

STEP_TOKENS = 1024
"""Of prompts and outputs, in one step of the target."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and its continuation. Row i is what the target computed for the token at index i, of which it drew the
    one after; the last token has none."""

    token_ids: torch.Tensor  # [tokens] int64
    taps: torch.Tensor  # [tokens - 1, layers, hidden], in the order in which they were asked for
    first: int
    """Row whose token is the first that was drawn. From there on laws are known."""
    top_ids: torch.Tensor  # [tokens - 1 - first, top] int64, likeliest first
    top_logprobs: torch.Tensor  # [tokens - 1 - first, top] float32

    @property
    def num_drawn(self) -> int:
        return len(self.top_ids)


@dataclass(slots=True)
class _Draft:
    """Of a passage, while it is written."""

    taps: list[torch.Tensor] = field(default_factory=list)
    top_ids: list[torch.Tensor] = field(default_factory=list)
    top_logprobs: list[torch.Tensor] = field(default_factory=list)


def room_for(prompts: Sequence[Sequence[int]], max_tokens: int, batch: int, block_size: int) -> int:
    """Blocks with which `batch` of them are written at a time, none waiting for another."""
    longest = sorted((len(prompt) for prompt in prompts), reverse=True)[:batch]
    return sum(-(-(length + max_tokens) // block_size) + 1 for length in longest)


def write(
    runner: ModelRunner, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams], needs: Needs, batch: int
) -> Iterator[tuple[int, Passage]]:
    """Passages of all prompts, with their index, as they are done. The runner's cache needs `room_for` them."""
    config = SchedulerConfig(
        max_num_seqs=batch,
        max_num_batched_tokens=max(STEP_TOKENS, batch),
        max_model_len=runner.config.max_position_embeddings,
    )
    blocks = BlockManager(runner.pool.num_blocks, runner.layout.block_size, enable_prefix_caching=False)
    scheduler, drafts = Scheduler(config, blocks), {}
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=params, deadline=0.0)
        scheduler.add(EngineSequence(request))
        drafts[str(index)] = _Draft()
    while scheduler.has_work:
        schedule = scheduler.schedule()
        step = build_batch(schedule, taps=needs.taps, return_logits=True)
        output = runner.submit(step).result()
        _take(schedule, step, output, needs, drafts)
        for update in scheduler.update(schedule, output.token_ids.tolist(), output.logprobs, output.prompt_logprobs):
            if update.finish is not None:
                sequence = update.sequence
                yield int(sequence.request_id), _passage(sequence, drafts.pop(sequence.request_id))


def _take(schedule: Schedule, batch: StepBatch, output: StepOutput, needs: Needs, drafts: dict[str, _Draft]) -> None:
    step = Step(schedule, batch, output)
    rows = step.rows_beside((), all_rows=True)
    if rows is None:
        return
    offsets, indices, of_step, logit_rows = rows.places
    taps = observed(step, Needs(taps=needs.taps), offsets, indices, of_step, logit_rows).taps
    hidden = torch.stack([taps[tap] for tap in needs.taps], 1).cpu() if needs.taps else None
    drawn = logit_rows >= 0
    laws = observed(step, Needs(top=needs.top), offsets, indices[drawn], of_step[drawn], logit_rows[drawn])
    law = 0
    for sequence, start, end in zip(rows.sequences, offsets, offsets[1:], strict=False):
        draft = drafts[sequence.request_id]
        if hidden is not None:
            draft.taps.append(hidden[start:end].clone())
        if drawn[end - 1] and laws.top_ids is not None and laws.top_logprobs is not None:
            draft.top_ids.append(torch.from_numpy(laws.top_ids[law]))
            draft.top_logprobs.append(torch.from_numpy(laws.top_logprobs[law]))
            law += 1


def _passage(sequence: EngineSequence, draft: _Draft) -> Passage:
    none = torch.empty(0, 0)
    return Passage(
        token_ids=torch.tensor(sequence.token_ids),
        taps=torch.cat(draft.taps) if draft.taps else none,
        first=sequence.num_prompt_tokens - 1,
        top_ids=torch.stack(draft.top_ids) if draft.top_ids else none.long(),
        top_logprobs=torch.stack(draft.top_logprobs) if draft.top_logprobs else none,
    )
