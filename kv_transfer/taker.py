"""The taking side of hand-offs: pulls the KV of a prompt from a prefill worker into blocks reserved for it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from core.errors import ChecksumMismatch, LayoutMismatch, LeaseExpired, TransferError, Unavailable
from core.links import Link, LinkClient
from engine.kv_cache import KVPool
from kv_transfer import messages, states
from kv_transfer.counters import TransferCounters
from kv_transfer.messages import SERVICE, FromGiver, Hello, Offer, SequenceState, ToGiver
from kv_transfer.pieces import Rows, Slots, piece_bytes, rows_of, slots_of
from kv_transfer.states import Outcome, TakerTransfer
from kv_transfer.transports.base import PullJob, Transport, Unusable
from kv_transfer.transports.shared_memory import SharedMemory
from kv_transfer.transports.torch_distributed import TorchDistributed, device_identity

logger = logging.getLogger(__name__)

TakerLink = Link[FromGiver, ToGiver]

TRANSPORTS = (SharedMemory.name, TorchDistributed.name)
"""In order of preference."""
HELLO_TIMEOUT_S = 5.0


class Withdrawn(TransferError):
    """The giver has nothing to take, or not any more."""
