"""From a schedule to the plain data of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.types import Request, SamplingParams
from engine.batching import block_array, build_batch, sampling_row
from engine.block_manager import BlockManager
from engine.schedule import Chunk, Schedule
from engine.sequence import Sequence


def make(prompt: list[int], output: tuple[int, ...] = (), **params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=50, **params)  # type: ignore[arg-type]
    sequence = Sequence(Request(request_id="r", prompt_token_ids=prompt, sampling=sampling, deadline=0))
    sequence.token_ids.extend(output)
    return sequence


def schedule(block_size: int, *chunks: Chunk) -> Schedule:
    return Schedule(block_size, list(chunks), num_tokens=sum(chunk.num_tokens for chunk in chunks))


def test_a_decode_and_a_chunk_of_a_prompt_lie_one_after_the_other() -> None:
    decode, prefill = make(list(range(100, 117)), (50,)), make(list(range(200, 260)))
    decode.block_table, prefill.block_table = [5, 2], [7, 3, 9, 0]
    batch = build_batch(schedule(16, Chunk(decode, 17, 1, True), Chunk(prefill, 14, 4, False)))
    assert batch.token_ids.tolist() == [50, 214, 215, 216, 217]
    assert batch.positions.tolist() == [17, 14, 15, 16, 17]
    assert batch.slots.tolist() == [2 * 16 + 1, 7 * 16 + 14, 7 * 16 + 15, 3 * 16, 3 * 16 + 1]
    assert batch.query_starts.tolist() == [0, 1, 5]
    assert batch.context_lens.tolist() == [17, 14]
    assert [table.tolist() for table in batch.block_tables] == [[5, 2], [7, 3, 9, 0]]
    assert batch.logit_rows.tolist() == [0]
    assert len(batch.sampling) == 1


def test_a_prompt_that_ends_in_the_step_draws_after_its_last_row() -> None:
    first, second = make([1, 2, 3]), make([4, 5])
    first.block_table, second.block_table = [0], [1]
    batch = build_batch(schedule(8, Chunk(first, 0, 3, True), Chunk(second, 0, 2, True)))
    assert batch.logit_rows.tolist() == [2, 4]
    assert [row.position for row in batch.sampling if row is not None] == [0, 0]


@given(
    st.sampled_from([8, 16, 32]),
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70)), min_size=1, max_size=6),
)
def test_rows_agree_with_the_tables_token_by_token(block_size: int, shape: list[tuple[int, int]]) -> None:
    blocks = BlockManager(200, block_size)
    chunks = []
    for number, (start, num_tokens) in enumerate(shape):
        sequence = make([1000 * number + i for i in range(start + num_tokens)])
        assert blocks.allocate(sequence)
        chunks.append(Chunk(sequence, start, num_tokens, number % 2 == 0))
    batch = build_batch(schedule(block_size, *chunks))
    rows = [(chunk, chunk.start + i) for chunk in chunks for i in range(chunk.num_tokens)]
    assert batch.positions.tolist() == [position for _, position in rows]
    assert batch.token_ids.tolist() == [chunk.sequence.token_ids[position] for chunk, position in rows]
    assert batch.slots.tolist() == [
        chunk.sequence.block_table[position // block_size] * block_size + position % block_size
        for chunk, position in rows
    ]
    assert batch.logit_rows.tolist() == [
        end - 1 for chunk, end in zip(chunks, batch.query_starts[1:].tolist(), strict=True) if chunk.samples
    ]
    assert {a.dtype for a in (batch.token_ids, batch.slots, batch.query_starts, batch.logit_rows)} == {np.dtype("i8")}


def test_a_batch_in_flight_keeps_its_block_table_while_the_sequence_grows_and_is_freed() -> None:
    blocks = BlockManager(100, 16)
    sequence = make([1] * 40)
    assert blocks.allocate(sequence)
    seen = []
    for num_tokens in range(40, 1500, 40):
        assert blocks.extend(sequence, num_tokens)
        seen.append((block_array(sequence), list(sequence.block_table)))
    blocks.free(sequence)
    other = make([2] * 40)
    assert blocks.allocate(other)
    assert blocks.allocate(sequence)
    seen.append((block_array(sequence), list(sequence.block_table)))
    assert all(array.tolist() == table for array, table in seen)


def test_token_lists_travel_only_for_the_penalties_that_read_them() -> None:
    def lists(**params: object) -> tuple[list[int], list[int]]:
        row = sampling_row(make([1, 2], (3, 4), **params))
        return list(row.prompt_token_ids), list(row.output_token_ids)

    assert lists() == ([], [])
    assert lists(presence_penalty=0.5) == ([], [3, 4])
    assert lists(frequency_penalty=-0.5) == ([], [3, 4])
    assert lists(repetition_penalty=1.2) == ([1, 2], [3, 4])


@pytest.mark.parametrize(("num_output", "forbidden"), [(0, (8, 9)), (1, (8, 9)), (2, ())])
def test_stop_tokens_are_forbidden_below_min_tokens(num_output: int, forbidden: tuple[int, ...]) -> None:
    row = sampling_row(make([1], (5,) * num_output, min_tokens=2, stop_token_ids=(8, 9)))
    assert (row.position, row.forbidden) == (num_output, forbidden)
