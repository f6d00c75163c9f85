"""Messages between gateway and worker, and between the two workers of a hand-off: tagged MessagePack structs.

A connection owns what was asked over it. When a gateway's connection to a worker closes, the worker aborts that
gateway's requests; when it closes under the gateway, the gateway re-dispatches them. There is no other bookkeeping of
who is alive.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct, field

from core.types import Request, Role, TokenDelta

# --- gateway to worker ---------------------------------------------------------------------------------------------


class Generate(Struct, frozen=True, tag=True):
    """Do all of it here: prefill (from the prefix cache as far as possible), then decode."""

    request: Request


class Prefill(Struct, frozen=True, tag=True):
    """Run the prompt and give its KV away under `transfer_id` as it is computed; emit the first token."""

    request: Request
    transfer_id: str


class Receive(Struct, frozen=True, tag=True):
    """Take the KV that `prefill_address` gives under `transfer_id`, then decode from the second token on. Opened
    follows."""

    request: Request
    transfer_id: str
    prefill_address: str
    within_s: float
    """What is left until the request's deadline, which is by another host's clock."""


class Abort(Struct, frozen=True, tag=True):
    """Stop and free everything. No delta follows. Unknown ids are ignored: the request may just have ended."""

    request_id: str


class Opened(Struct, frozen=True, tag=True):
    """The prompt of a hand-off has its blocks on the prefill side: that worker tells the gateway, and the gateway tells
    the decode worker, which gives it blocks of its own not before. As blocks are taken there first and here second, no
    two hand-offs can wait for each other's, whatever the order of the two queues."""

    request_id: str


ToWorker = Generate | Prefill | Receive | Opened | Abort


# --- worker to gateway ---------------------------------------------------------------------------------------------


class Step(Struct, frozen=True, tag=True):
    """All that one engine step produced for this gateway."""

    deltas: list[TokenDelta]


class HandoffFailed(Struct, frozen=True, tag=True):
    """The decode side gave up on a transfer and freed its blocks; the request is the gateway's to re-dispatch."""

    request_id: str
    reason: str


class DrafterCounters(Struct, frozen=True, kw_only=True):
    """Of one drafter in one version."""

    drafter: str
    version: str
    """Empty if it has none."""
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    alpha_sum: float
    """Of sum min(p, q), over the positions at which drafts were judged and it is known."""
    alpha_positions: int
    drafts_per_position: list[int]
    """Drafts that had a token at each depth, the first being what follows the last token of the output."""
    accepted_per_position: list[int]
    """Drafts of which one was accepted there."""
    alarm: str = ""
    """What is implausible about its acceptance lately, `low` or `high`; empty if nothing is."""


class SpeculationCounters(Struct, frozen=True, kw_only=True):
    """Of a worker that speculates."""

    drafters: list[DrafterCounters]
    switched_off: list[str]
    """Drafters that have failed on this worker and are not asked any more."""
    draft_seconds: float
    verify_seconds: float
    """Judging drafts and telling drafters; the steps themselves are in step_seconds of the worker."""


class WorkerCounters(Struct, frozen=True, kw_only=True):
    """Monotonic since the worker started."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Computed by these steps, of prompts and outputs."""
    step_seconds: float = 0.0
    transfers_committed: int = 0
    """Transfers are counted where they are taken, so each once; offers below where they are given."""
    transfers_failed: int = 0
    transfers_expired: int = 0
    transfers_aborted: int = 0
    offers_committed: int = 0
    offers_failed: int = 0
    offers_expired: int = 0
    offers_aborted: int = 0
    transport_fallbacks: int = 0
    transfer_bytes: int = 0
    transfer_seconds: float = 0.0
    transfer_wait_seconds: float = 0.0
    transfer_wire_seconds: float = 0.0
    transfer_overlap_seconds: float = 0.0
    transfer_encode_seconds: float = 0.0
    transfer_decode_seconds: float = 0.0
    transfer_wire_bytes: dict[str, int] = field(default_factory=dict)
    """By codec."""
    speculation: SpeculationCounters | None = None
    """None if the worker does not speculate; of one that only shows prompts to drafters, those that have failed."""


class WorkerStatus(Struct, frozen=True, kw_only=True, tag=True):
    """Sent when a session opens and then every STATUS_PERIOD_S: load for the router, numbers for /metrics, and the
    heartbeat: a worker silent for STATUS_TIMEOUT_S is taken for dead."""

    worker_id: str
    role: Role
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    leaving: bool = False
    """It ends what it has and then goes: nothing new is to be sent there."""
    counters: WorkerCounters


FromWorker = Step | Opened | HandoffFailed | WorkerStatus

WORKER_SERVICE = "Worker"
"""The links (core.links) that carry ToWorker and FromWorker."""

STATUS_PERIOD_S = 0.25
STATUS_TIMEOUT_S = 5.0

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: object) -> bytes:
    return _encoder.encode(message)


def decoder(union: type[M]) -> msgspec.msgpack.Decoder[M]:
    """A decoder that validates; a malformed message raises msgspec.ValidationError."""
    return msgspec.msgpack.Decoder(union)
