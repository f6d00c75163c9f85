"""One request inside an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.types import PromptLogprobs, Request

if TYPE_CHECKING:
    from engine.structured.constraint import Constraint


class Status(Enum):
    WAITING = auto()
    """No blocks, or preempted and to be recomputed."""
    RUNNING = auto()
    """In the batch."""
    HELD = auto()
    """No longer computed; its blocks are a hand-off's until released."""
    RESERVED = auto()
    """Blocks allocated for KV that is still arriving."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is prompt and output together. The KV of token_ids[:num_computed_tokens] is in the blocks; all
    tokens but the last are computed once a sequence decodes."""

    request: Request
    hold_after_prefill: bool = False
    """Prefill role: its blocks are for a hand-off, and it becomes HELD after the first token instead of decoding on."""
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    block_table: list[int] = field(default_factory=list)

    # Set by the scheduler.
    arrival: int = 0
    """Place in the order of arrival, kept through preemption."""
    awaits_kv: bool = False
    """Decode side of a hand-off: the KV of token_ids comes from another worker. False once it has."""
    deferred: bool = False
    """Waits without a claim to blocks, until Engine.undefer."""
    inexact_kv: bool = False
    """A codec has changed some of its KV on the way here, and so what is computed on top of that is not the model's
    either: no other sequence may have it. False again when it gets other blocks."""
    awaited_block: tuple[Sequence | None, int] = (None, 0)
    """While it waits for the prefix of another: whose, and the place of the block whose coming ends that."""
    exposed: bool = False
    """Its blocks belong to a hand-off, from admission until released: another worker may be reading what is final."""
    in_flight: bool = False
    """Part of a step that was scheduled and has not been updated yet."""
    num_preemptions: int = 0
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """Of the chunks of the prompt computed so far, until they are reported."""

    kv_moves: NDArray[np.int64] | None = None
    """[moves, 2] slots, for the step that computes it next: they bring the KV of accepted draft tokens to its place."""

    # Set by the engine.
    constraint: Constraint | None = None
    """What the grammar allows after token_ids; None without one."""

    # Set by the block manager.
    unit_digests: list[bytes] = field(default_factory=list)
    """Prefix-cache chain over the full units of token_ids. Tokens are only ever appended, so it stays true."""
    num_cacheable_blocks: int = 0
    """Leading blocks that the prefix cache knows, or knew until they were evicted in favour of an equal block."""

    # Set by batching.
    block_array: NDArray[np.int64] | None = None
    """block_table[:num_array_blocks] with room to grow; the block manager drops it when it frees the table."""
    num_array_blocks: int = 0

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = [*self.request.prompt_token_ids, *self.request.emitted_token_ids]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens emitted so far, those of an earlier worker included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether this engine still has to report them, for which it has to compute all of the prompt itself."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and not self.awaits_kv and self.num_output_tokens == 0

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 when decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """All that there are so far, from now on the caller's."""
        parts, self.prompt_logprobs = self.prompt_logprobs, []
        return PromptLogprobs.joined(parts) if parts else None
