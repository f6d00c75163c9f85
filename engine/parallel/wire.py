"""What the leader of a group and its ranks say to each other: length-prefixed MessagePack over a socket pair.

A socket that ends is the end of both: a rank that has lost its leader exits, a leader that has lost a rank ends the
group.
"""

from __future__ import annotations

import socket
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct

from core.types import PromptLogprobs, TokenLogprobs
from engine.parallel.lending import Lent
from engine.parallel.split import Split
from engine.plan import Plan
from engine.step import StepBatch, StepOutput

_HEADER_BYTES = 8


class Setup(Struct, frozen=True, tag=True, kw_only=True):
    """To a rank, first of all: load your share."""

    plan: Plan
    split: Split
    meeting: str
    """Path of the file at which the ranks meet."""
    threads: int
    memory: int | None
    """Descriptor of the memory that the ranks share as their cache."""


class Run(Struct, frozen=True, tag=True):
    """To every rank: the next step. There is no answer before its end."""

    step: int
    batch: StepBatch


class Resize(Struct, frozen=True, tag=True):
    """To every rank, before the first step, when they have room for different numbers of blocks: take this one."""

    num_blocks: int


class Lend(Struct, frozen=True, tag=True):
    """To every rank with a GPU, when its cache has its size: say where it is."""


class Ready(Struct, frozen=True, tag=True):
    """From a rank that has loaded its share, and has a cache of so many blocks."""

    num_blocks: int


class Refused(Struct, frozen=True, tag=True):
    """From a rank that can't: the name of an error of core.errors, and what it says."""

    error: str
    message: str


class Failed(Struct, frozen=True, tag=True):
    """From a rank whose step raised. It stays until the leader hangs up, so that nobody else fails for its sake."""

    step: int
    message: str


class Done(Struct, frozen=True, tag=True, kw_only=True):
    """From a rank that has run a step. The fields are StepOutput's; what a rank has nothing to say of is empty."""

    step: int
    token_ids: np.ndarray
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    logits: torch.Tensor | None = None
    top: tuple[np.ndarray, np.ndarray] | None = None
    taps: dict[int, torch.Tensor] = {}
    seconds: float = 0.0

    @staticmethod
    def of(step: int, output: StepOutput) -> Done:
        return Done(step=step, **{name: getattr(output, name) for name in _OUTPUT})

    def output(self) -> StepOutput:
        return StepOutput(**{name: getattr(self, name) for name in _OUTPUT})


_OUTPUT = tuple(StepOutput.__dataclass_fields__)

FromRank = Ready | Lent | Refused | Failed | Done
ToRank = Setup | Resize | Lend | Run


class Channel:
    """One end of a socket pair. Raises EOFError when the other end is gone, TimeoutError when it stands still."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        """How long the other end may take for one message."""
        self._socket.settimeout(seconds)

    def send(self, message: ToRank | FromRank) -> None:
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError("the other end has closed") from error

    def receive_from_rank(self) -> FromRank:
        message: FromRank = _FROM_RANK.decode(self._receive())
        return message

    def receive_from_leader(self) -> ToRank:
        message: ToRank = _TO_RANK.decode(self._receive())
        return message

    def hang_up(self) -> None:
        """Both ends see the end of it at once, whoever is waiting."""
        with suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _receive(self) -> bytearray:
        return self._exactly(int.from_bytes(self._exactly(_HEADER_BYTES), "little"))

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                got = self._socket.recv_into(view)
            except ConnectionResetError as error:
                raise EOFError("the other end has closed") from error
            if not got:
                raise EOFError("the other end has closed")
            view = view[got:]
        return data


def frame(message: ToRank | FromRank) -> bytes:
    """A message as it is sent; encoded once for all ranks."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return str(value.dtype).removeprefix("torch."), value.shape, raw.numpy().tobytes()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} can't be sent to a rank")


def _decode(kind: Any, value: Any) -> Any:
    kind = typing.get_origin(kind) or kind
    if kind is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(bytearray(data), dtype).reshape(shape)  # torch wants arrays that may be written to
    if kind is torch.Tensor:
        name, shape, data = value
        dtype = getattr(torch, name)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"{kind} can't be received")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode)
_FROM_RANK = msgspec.msgpack.Decoder(FromRank, dec_hook=_decode)
_TO_RANK = msgspec.msgpack.Decoder(ToRank, dec_hook=_decode)
