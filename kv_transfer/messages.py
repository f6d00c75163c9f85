"""What the two sides of a hand-off say to each other over their link (core.links, service SERVICE).

The decode side (taker) opens the link and asks; the prefill side (giver) answers. One link carries every transfer
between the two. Each end starts with Hello; the taker's first Hello is answered even if the layouts can't be joined, so
that both sides name the field that differs.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from core.draft_state import DraftStates
from core.errors import LayoutMismatch
from engine.kv_layout import KVLayout
from kv_transfer.codecs.names import CodecName
from kv_transfer.states import Outcome

SERVICE = "KvTransfer"
REVISION = 2
"""Of these messages and of how KV is cut for the wire. Raise it with any change that another end would not understand:
workers of two versions meet while a deployment is rolled out."""


class SharedPool(Struct, frozen=True):
    """Where a process of the same host finds the giver's pool: descriptors of process `pid`. `probe_fd` holds `token`;
    a taker that reads it there has the right process in front of it."""

    host: str
    """Boot id and pid namespace: pids mean the same to processes with equal `host`."""
    pid: int
    pool_fd: int
    probe_fd: int
    token: bytes


class TcpEndpoint(Struct, frozen=True):
    """Where the giver's TCP data plane listens, on the host of the link, and what the link's taker says there first."""

    port: int
    token: bytes


class NixlEndpoint(Struct, frozen=True):
    """The giver's pool as its NIXL agent has registered it: `memory` is DRAM or VRAM, of device `device`."""

    metadata: bytes
    """Of the agent."""
    base: int
    memory: str
    device: int


class Hello(Struct, frozen=True, tag=True, kw_only=True):
    layout: KVLayout
    num_blocks: Annotated[int, Meta(ge=1)]
    device: str
    """"cpu", or the identity of the CUDA device."""
    lease_s: float | None = None
    """Set by the giver: a transfer not renewed for this long ends."""
    shared_pool: SharedPool | None = None
    tcp: TcpEndpoint | None = None
    nixl: NixlEndpoint | None = None
    encode_rates: dict[CodecName, float] = field(default_factory=dict)
    """Set by the giver, of the codecs that a taker may choose among: bytes of KV per second that it encodes."""
    revision: int = 0
    """REVISION of who says it."""

    def check_joins(self, layout: KVLayout) -> None:
        """Raise LayoutMismatch, naming what differs, unless KV can move between who says this and us with `layout`."""
        if self.revision != REVISION:
            raise LayoutMismatch(
                f"hand-offs of revision {REVISION} here and {self.revision} there; run one version of Slipstream "
                "on all workers",
                field="revision",
            )
        layout.check_same_cache(self.layout)


# --- taker to giver --------------------------------------------------------------------------------------------------


class Expect(Struct, frozen=True, tag=True):
    """Want will follow once blocks are free here; until then Renew says that somebody still waits."""

    transfer_id: str


class Want(Struct, frozen=True, tag=True):
    """Blocks are reserved here; give the KV of tokens `start_token` and later as it is computed, in this codec."""

    transfer_id: str
    start_token: int
    codec: CodecName = "none"


class Renew(Struct, frozen=True, tag=True):
    """Still waiting or transferring. `sent_at` is the taker's clock and comes back in Renewed."""

    transfer_id: str
    sent_at: float


class Verified(Struct, frozen=True, tag=True):
    """The first `num_pieces` are here: nobody will ask for their frames again. Said of transfers in a codec."""

    transfer_id: str
    num_pieces: int


class Committed(Struct, frozen=True, tag=True):
    """Every piece is here and verified; the giver's blocks are no longer needed."""

    transfer_id: str


class Cancel(Struct, frozen=True, tag=True):
    """The taker has given up. The transfer has ended on its side."""

    transfer_id: str
    reason: str


class OpenPair(Struct, frozen=True, tag=True):
    """Build a pair of process groups for torch.distributed, the giver as rank 0. Pair ids are never used twice. `host`
    is the giver's address as the taker reaches it."""

    pair_id: str
    backend: str
    host: str


class PairKey(Struct, frozen=True, tag=True):
    """Both ways: what one end has put into the store that the pair's rendezvous reads."""

    pair_id: str
    key: str
    value: bytes


class Pull(Struct, frozen=True, tag=True):
    """Send the pieces `first` .. `last` - 1 of the transfer over the pair, as one message of `nbytes`."""

    transfer_id: str
    pair_id: str
    first: int
    last: int
    nbytes: int


class ClosePair(Struct, frozen=True, tag=True):
    pair_id: str


ToGiver = Hello | Expect | Want | Renew | Verified | Committed | Cancel | OpenPair | PairKey | Pull | ClosePair


# --- giver to taker --------------------------------------------------------------------------------------------------


class Piece(Struct, frozen=True, array_like=True):
    """A range of tokens in a range of layers, and the xxh3-64 of its bytes in canonical order: layer, key before value,
    token, head, element. The order knows nothing of blocks, so that it is the same on both sides. Of a piece that
    travels as a frame (kv_transfer.coding) it is the xxh3-64 of the frame."""

    token: int
    num_tokens: int
    layer: int
    num_layers: int
    checksum: int


class Offer(Struct, frozen=True, tag=True, kw_only=True):
    """What there is to take, or will be: the KV of tokens start_token .. num_tokens - 1. Pieces follow in Sealed."""

    transfer_id: str
    layout: KVLayout
    start_token: int
    num_tokens: int
    block_ids: list[int]
    """The giver's block table of the sequence, from token 0."""
    codec: CodecName
    """That was asked for."""


class Sealed(Struct, frozen=True, tag=True):
    """These pieces are final and may be pulled; `first` is the place of the first among all of the transfer."""

    transfer_id: str
    first: int
    pieces: list[Piece]


class SequenceState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the giver has left the sequence. All else follows from its tokens: a random number is keyed by (seed,
    position), penalties count tokens, and the taker's own constraint is advanced by those that it is given."""

    token_ids: list[int]
    """Output tokens the giver has emitted, one at least."""
    draft_states: DraftStates = field(default_factory=dict)
    """What its drafters know of the prompt beside the tokens."""


class Complete(Struct, frozen=True, tag=True):
    """The prompt is computed and there are no pieces beyond the `num_pieces` that were named, here or before."""

    transfer_id: str
    num_pieces: int
    state: SequenceState
    age_s: float
    """How long ago the prompt was computed."""
    encode_s: float = 0.0
    """What the codec took for all of it."""
    last: list[Piece] = field(default_factory=list)
    """The last of the pieces, as in Sealed: a message less that a request waits for."""


class Renewed(Struct, frozen=True, tag=True):
    transfer_id: str
    sent_at: float


class Withdrawn(Struct, frozen=True, tag=True):
    """There is nothing to take, or not any more. `outcome` ABORTED: the giver's owner has dropped the request.
    `finished`: it did so because the request ended with its first token, and whoever asked for it has been told."""

    transfer_id: str
    reason: str
    outcome: Outcome
    finished: bool = False


class PairFailed(Struct, frozen=True, tag=True):
    """The pair is gone; what was pending on it never completes."""

    pair_id: str
    reason: str


FromGiver = Hello | Offer | Sealed | Complete | Renewed | Withdrawn | PairKey | PairFailed
