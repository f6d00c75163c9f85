"""From what the scheduler decided to what the runner is given.

On the path of every step: a decode row costs a few scalar writes, and block tables are kept as arrays that grow.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from core.types import SamplingParams, TokenLogprobs
from engine.drafts import Draft
from engine.schedule import Chunk, Schedule
from engine.sequence import Sequence
from engine.step import SamplingRow, ScoredRows, StepBatch

_SPARE_BLOCKS = 32
"""Room that a block array is given to grow: it is copied once in this many blocks."""


def build_batch(
    schedule: Schedule, *, taps: tuple[int, ...] = (), return_logits: bool = False, num_top: int = 0
) -> StepBatch:
    """Rows in the order of the chunks; one logit row for each chunk that samples, or one for each row of its draft."""
    chunks, block_size = schedule.chunks, schedule.block_size
    num_tokens = schedule.num_tokens
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slots = np.empty(num_tokens, np.int64)
    query_starts = [0]
    row = 0
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.start
        if chunk.draft is not None:
            end = row + chunk.num_tokens
            token_ids[row] = sequence.token_ids[start]
            token_ids[row + 1 : end] = chunk.draft.token_ids
            positions[row] = start
            positions[row + 1 : end] = start + chunk.draft.depths
            slots[row:end] = slots_of(chunk, block_size)
            row = end
        elif chunk.num_tokens == 1:
            token_ids[row] = sequence.token_ids[start]
            positions[row] = start
            slots[row] = sequence.block_table[start // block_size] * block_size + start % block_size
            row += 1
        else:
            end = row + chunk.num_tokens
            token_ids[row:end] = sequence.token_ids[start : start + chunk.num_tokens]
            positions[row:end] = np.arange(start, start + chunk.num_tokens)
            slots[row:end] = slots_of(chunk, block_size)
            row = end
        query_starts.append(row)
    adapters = tuple([chunk.sequence.request.adapter for chunk in chunks])
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        query_starts=np.array(query_starts, np.int64),
        context_lens=np.array([chunk.start for chunk in chunks], np.int64),
        block_tables=tuple([block_array(chunk.sequence) for chunk in chunks]),
        logit_rows=_logit_rows(chunks, query_starts),
        sampling=tuple([row for chunk in chunks if chunk.samples for row in _sampling_rows(chunk)]),
        tree_parents=_tree_parents(chunks, num_tokens),
        kv_moves=_kv_moves(chunks),
        taps=taps,
        return_logits=return_logits,
        num_top=num_top,
        adapters=adapters if any(adapters) else (),
        publish=any(chunk.sequence.exposed for chunk in chunks),
        scored=tuple([_scored(c, row) for c, row in zip(chunks, query_starts, strict=False) if c.num_scored]),
    )


def slots_of(chunk: Chunk, block_size: int) -> NDArray[np.int64]:
    """[num_tokens] where the KV of each row goes."""
    index = np.arange(chunk.start, chunk.start + chunk.num_tokens)
    return block_array(chunk.sequence)[index // block_size] * block_size + index % block_size


def of_plain_rows(schedule: Schedule, logprobs: tuple[TokenLogprobs | None, ...]) -> tuple[TokenLogprobs | None, ...]:
    """StepOutput.logprobs with one entry for each chunk that samples, None for those whose verdict has its own."""
    found, row = [], 0
    for chunk in schedule.chunks if logprobs else ():
        if chunk.samples:
            found.append(logprobs[row] if chunk.draft is None else None)
            row += chunk.num_logit_rows
    return tuple(found)


def _logit_rows(chunks: list[Chunk], query_starts: list[int]) -> NDArray[np.int64]:
    rows: list[int] = []
    for chunk, end in zip(chunks, query_starts[1:], strict=True):
        rows.extend(range(end - chunk.num_logit_rows, end))
    return np.array(rows, np.int64)


def _tree_parents(chunks: list[Chunk], num_tokens: int) -> NDArray[np.int64] | None:
    """None if every sequence is a chain."""
    if all(chunk.draft is None or chunk.draft.is_chain for chunk in chunks):
        return None
    parents = np.empty(num_tokens, np.int64)
    row = 0
    for chunk in chunks:
        own = parents[row : row + chunk.num_tokens]
        if chunk.draft is None:
            own[:] = np.arange(-1, chunk.num_tokens - 1)
        else:
            own[0] = -1
            own[1:] = 1 + chunk.draft.parents
        row += chunk.num_tokens
    return parents


def _kv_moves(chunks: list[Chunk]) -> NDArray[np.int64] | None:
    """Those that the sequences of this step have waited with."""
    moves = [chunk.sequence.kv_moves for chunk in chunks if chunk.sequence.kv_moves is not None]
    for chunk in chunks:
        chunk.sequence.kv_moves = None
    return np.concatenate(moves) if moves else None


def _sampling_rows(chunk: Chunk) -> list[SamplingRow]:
    """How the token after each row that wants one is to be drawn."""
    row, draft = sampling_row(chunk.sequence), chunk.draft
    if draft is None:
        return [row]
    params = row.params
    greedy = params.temperature == 0 and params.min_tokens == 0 and draft.allowed is None
    if greedy and not _counts_output(params):
        return [row] * draft.num_rows  # nothing depends on where it is
    return [row if node < 0 else _after(row, draft, node) for node in range(-1, draft.num_rows - 1)]


def _after(root: SamplingRow, draft: Draft, node: int) -> SamplingRow:
    """As sampling_row, once the draft has been followed to this node."""
    params, position = root.params, root.position + int(draft.depths[node])
    penalized = _counts_output(params)
    return SamplingRow(
        params,
        position,
        prompt_token_ids=root.prompt_token_ids,
        output_token_ids=[*root.output_token_ids, *draft.path_to(node)] if penalized else (),
        forbidden=params.stop_token_ids if position < params.min_tokens else (),
        allowed=None if draft.allowed is None else draft.allowed[1 + node],
    )


def _counts_output(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _scored(chunk: Chunk, row: int) -> ScoredRows:
    sequence, following = chunk.sequence, chunk.start + 1
    token_ids = sequence.token_ids[following : following + chunk.num_scored]
    return ScoredRows(row, np.array(token_ids, np.int64), sequence.request.sampling.prompt_logprobs or 0)


def sampling_row(sequence: Sequence) -> SamplingRow:
    """How the next token of the sequence is to be drawn."""
    params = sequence.request.sampling
    if params.grammar is not None:
        params = replace(params, grammar=None)  # the mask says all of it, and is shorter
    position = sequence.num_output_tokens
    return SamplingRow(
        params,
        position,
        prompt_token_ids=sequence.request.prompt_token_ids if params.repetition_penalty != 1.0 else (),
        output_token_ids=sequence.output_token_ids if _counts_output(params) else (),
        forbidden=params.stop_token_ids if position < params.min_tokens else (),
        allowed=None if sequence.constraint is None else sequence.constraint.allowed,
    )


def block_array(sequence: Sequence) -> NDArray[np.int64]:
    """`block_table` as an array: a view that later growth leaves as it is, so a batch in flight may keep it."""
    table, array, known = sequence.block_table, sequence.block_array, sequence.num_array_blocks
    if array is None or len(table) > len(array):
        array = np.empty(len(table) + _SPARE_BLOCKS, np.int64)
        array[: len(table)] = table
        sequence.block_array = array
    elif len(table) > known:
        array[known : len(table)] = table[known:]
    sequence.num_array_blocks = len(table)
    return array[: len(table)]
