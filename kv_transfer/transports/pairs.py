"""Pairs: two-rank process groups of torch.distributed, one per transfer in flight, disposable.

No default group is involved, so any two processes can form any number of pairs. What torch asks for, and what follows:

- A rendezvous that was used before can crash the process: every pair has a store of its own, that is thrown away.
- A pending receive can't be aborted, and an operation that timed out has spoilt the pair. So one thread owns the group,
  operations end by themselves within OP_TIMEOUT_S, and a pair that has seen any error is dropped in that thread.
- A message longer than the receive posted for it kills the receiver: both ends compute lengths from the manifest and
  the giver checks that they agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, Store, Work

from core.errors import TransferError

OP_TIMEOUT_S = 4.0
"""A peer that is stopped, not dead, or can't be reached is noticed after this long. Less than a taker allows between
two pieces, so that another transport gets its chance."""

GIVER_RANK, TAKER_RANK = 0, 1

T = TypeVar("T")


class Group(Protocol):
    """The part of a torch backend that a pair uses."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...


class LinkStore(Store):
    """Where the two ends of one pair meet: each end's own copy, what the other end sets comes in over the link.

    It lives and dies with its pair, so nothing of an earlier attempt can be in it, and nobody has to listen on a port:
    torch's TCPStore loses connections when a few dozen pairs are built at once.
    """

    def __init__(self, publish: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._publish = publish
        self._values: dict[str, bytes] = {}
        self._failure: str | None = None
        self._changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        """The other end has set this."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The other end is gone: whoever waits here stops waiting."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()

    # --- what torch calls, from the pair's thread ------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else value
        self.put(key, value)
        self._publish(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta = timedelta(seconds=OP_TIMEOUT_S)) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: self._failure or self.check(keys), timeout.total_seconds())
        if self._failure is not None:
            raise TransferError(self._failure)
        if not found:
            raise TransferError(f"the other end did not join within {timeout.total_seconds():g} s")


class PairEnd:
    """One end of a pair and the thread that owns it. Futures fail with TransferError; after the first failure every
    later one fails at once. `publish` sends a key to the other end's store and is called from that thread."""

    def __init__(self, backend: str, rank: int, device: torch.device, publish: Callable[[str, bytes], None]) -> None:
        self.device = device
        self.store = LinkStore(publish)
        self._backend = backend
        self._rank = rank
        self._group: Group | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-pair")

    def build(self, own_host: str) -> Future[None]:
        """Meet the other end; returns once both are connected. `own_host` is the address of this end to bind to."""

        def build() -> None:
            make = _nccl if self._backend == "nccl" else _gloo
            self._group = make(self.store, self._rank, own_host, timedelta(seconds=OP_TIMEOUT_S))

        return self._thread.submit(self._guarded, build)

    def submit(self, operation: Callable[[Group], T]) -> Future[T]:
        """Run on the pair's thread, after what was submitted before."""

        def run() -> T:
            if self._group is None:
                raise TransferError("the pair has failed before")
            return operation(self._group)

        return self._thread.submit(self._guarded, run)

    def close(self) -> None:
        """Drop the group once what was submitted has ended. Returns at once."""
        self.store.fail("the pair was closed")
        self._thread.submit(self._drop)
        self._thread.shutdown(wait=False)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except TransferError:
            self._drop()
            raise
        except (RuntimeError, OSError, ValueError) as error:  # what torch raises for peers, networks and timeouts
            self._drop()
            raise TransferError(f"{self._backend} pair failed: {_first_line(error)}") from error

    def _drop(self) -> None:
        self._group = None


def wait(work: Work, device: torch.device) -> None:
    """Until the operation is over: `Work.wait` alone only orders CUDA streams."""
    work.wait(timedelta(seconds=OP_TIMEOUT_S))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _gloo(store: Store, rank: int, own_host: str, timeout: timedelta) -> Group:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
    return cast("Group", ProcessGroupGloo(store, rank, 2, options))


def _nccl(store: Store, rank: int, _own_host: str, timeout: timedelta) -> Group:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # absent from CPU builds of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("Group", ProcessGroupNCCL(store, rank, 2, options))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
