"""One request inside an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from core.types import Request


class Status(Enum):
    WAITING = auto()
    """No blocks, or preempted and to be recomputed."""
    RUNNING = auto()
    """In the batch."""
    HELD = auto()
    """Prefilled; its blocks are kept for a hand-off until released."""
    RESERVED = auto()
    """Blocks allocated for KV that is still arriving."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is prompt and output together. The KV of token_ids[:num_computed_tokens] is in the blocks; all
    tokens but the last are computed once a sequence decodes."""

    request: Request
    hold_after_prefill: bool = False
    """Prefill role: become HELD after the first token instead of decoding on."""
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    block_table: list[int] = field(default_factory=list)

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
    def num_pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 when decoding."""
        return len(self.token_ids) - self.num_computed_tokens
