"""One step of the model, as plain data: what goes in, what comes out.

A StepBatch is flat over tokens and holds no tensors, so that it can be sent to every rank of a group. Sequence s owns
the rows query_starts[s] .. query_starts[s + 1]. Before the step its KV cache holds context_lens[s] tokens; row j of the
sequence (from 0) writes its KV at logical index context_lens[s] + j, which block_tables[s] maps to a slot. Positions
are what RoPE sees and differ from logical indices only in a token tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from core.types import PromptLogprobs, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to draw the token after one row. The random number is keyed by (params.seed, position): the same seed gives
    the same text whatever else is in the batch."""

    params: SamplingParams
    position: int
    """Index in the output of the token to be drawn."""
    prompt_token_ids: Sequence[int] = ()
    """Read only when a repetition penalty is set."""
    output_token_ids: Sequence[int] = ()
    """Read only when a penalty is set."""
    forbidden: tuple[int, ...] = ()
    """Token ids that may not be drawn (stop tokens below min_tokens)."""
    allowed: NDArray[np.uint32] | None = None
    """[ceil(vocab / 32)] bit i % 32 of word i // 32: whether a grammar allows token i. None allows all."""


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows of a prompt whose next tokens are known and wanted with their logprobs."""

    start: int
    """Row of the first, in the batch."""
    next_token_ids: NDArray[np.int64]  # [rows]
    num_top: int
    """How many of the most likely tokens to report beside each."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    token_ids: NDArray[np.int64]  # [tokens]
    positions: NDArray[np.int64]  # [tokens]
    slots: NDArray[np.int64]  # [tokens] where each row's KV is written: block * block_size + offset
    query_starts: NDArray[np.int64]  # [sequences + 1]
    context_lens: NDArray[np.int64]  # [sequences] KV tokens present before the step
    block_tables: tuple[NDArray[np.int64], ...]  # [sequences][blocks], long enough for context and rows
    logit_rows: NDArray[np.int64]  # [rows] indices into tokens
    sampling: tuple[SamplingRow | None, ...] = ()  # one per logit row; None wants no draw (its token id is -1)
    tree_parents: NDArray[np.int64] | None = None
    """[tokens] row of the parent within the same sequence, -1 for a root: a row then sees the context, its ancestors
    and itself. None is a chain: a row sees every earlier row of its sequence."""
    kv_moves: NDArray[np.int64] | None = None  # [moves, 2] (from slot, to slot), all read before any is written
    taps: tuple[int, ...] = ()
    """Layers whose input hidden states are wanted; num_layers taps the output of the last layer, before the norm."""
    adapters: tuple[str, ...] = ()
    """[sequences] names of the LoRA adapters to compute with, "" for the base model; empty when it is all of them."""
    publish: bool = False
    """Call the runner's KV sink after each layer has written its KV."""
    scored: tuple[ScoredRows, ...] = ()
    return_logits: bool = False
    num_top: int = 0
    """Of each logit row so many of the likeliest tokens are wanted. They are in the logits; a rank of another process
    sends them in place of these, which are thousands of times as large."""

    @property
    def wants_logits(self) -> bool:
        return self.return_logits or self.num_top > 0


NOT_ASKED = -1
"""Token id of a logit row that wants no draw."""
UNDRAWABLE = -2
"""Token id of a row from which no token can be drawn: its scores are not numbers, or every token is forbidden."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    token_ids: NDArray[np.int64]  # [logit rows], with NOT_ASKED and UNDRAWABLE
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # [logit rows] or empty when no row asked
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # one for each of the batch's `scored`
    logits: torch.Tensor | None = None  # [logit rows, vocab] float32, the raw ones
    top: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """[logit rows, num_top] ids and logprobs, the likeliest first, where a rank was not asked for `logits`."""
    taps: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [tokens, hidden]
    seconds: float = 0.0
    """Wall time from the start of the step's work to its end."""


KVSink = Callable[[int, StepBatch], None]
"""Called with a layer index as soon as that layer's KV of the batch is written (on CUDA: enqueued)."""


class Runner(Protocol):
    """One model on one group of devices. Steps run in the order they were submitted; several may be in flight."""

    @property
    def max_steps_in_flight(self) -> int:
        """How many it works on at a time: more would only queue."""
        ...

    def submit(self, batch: StepBatch) -> Future[StepOutput]: ...

    def check_health(self) -> None:
        """Raises InternalError when no step can be run any more."""
        ...

    def shutdown(self) -> None: ...
