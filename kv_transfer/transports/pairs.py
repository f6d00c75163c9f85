"""Pairs: two-rank process groups of torch.distributed, one per transfer in flight, disposable.

No default group is involved, so any two processes can form any number of pairs. What torch asks for, and what follows:

- Rendezvous under a prefix never used before: pair ids are random. Each end has its own connection to the store, since
  a thread that waits on a store blocks everybody else on it.
- A pending receive can't be aborted, and an operation that timed out has spoilt the pair. So one thread owns the group,
  operations end by themselves within OP_TIMEOUT_S, and a pair that has seen any error is dropped in that thread.
- A message longer than the receive posted for it kills the receiver: both ends compute lengths from the manifest and
  the giver checks that they agree.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore, Work

from core.errors import TransferError

OP_TIMEOUT_S = 5.0
"""A peer that is stopped, not dead, is noticed after this long."""

GIVER_RANK, TAKER_RANK = 0, 1

T = TypeVar("T")


class Group(Protocol):
    """The part of a torch backend that a pair uses."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...


class Rendezvous:
    """The giver's store, where pairs meet. Listens from the first use on."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None

    @property
    def port(self) -> int:
        if self._store is None:
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        return self._store.port


class PairEnd:
    """One end of a pair and the thread that owns it. Futures fail with TransferError; after the first failure every
    later one fails at once."""

    def __init__(self, pair_id: str, backend: str, rank: int, device: torch.device) -> None:
        self.pair_id = pair_id
        self.device = device
        self._backend = backend
        self._rank = rank
        self._group: Group | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kv-pair-{pair_id[:8]}")

    def build(self, store_host: str, port: int, own_host: str) -> Future[None]:
        """Meet the other end at the store; returns once both are connected. `own_host` is the address to bind to."""

        def build() -> None:
            timeout = timedelta(seconds=OP_TIMEOUT_S)
            store = TCPStore(store_host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            make = _nccl if self._backend == "nccl" else _gloo
            self._group = make(PrefixStore(self.pair_id, store), self._rank, own_host, timeout)

        return self._thread.submit(self._guarded, build)

    def submit(self, operation: Callable[[Group], T]) -> Future[T]:
        """Run on the pair's thread, after what was submitted before."""

        def run() -> T:
            if self._group is None:
                raise TransferError(f"pair {self.pair_id} has failed")
            return operation(self._group)

        return self._thread.submit(self._guarded, run)

    def close(self) -> None:
        """Drop the group once what was submitted has ended. Returns at once."""
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


def _gloo(store: PrefixStore, rank: int, own_host: str, timeout: timedelta) -> Group:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
    return cast("Group", ProcessGroupGloo(store, rank, 2, options))


def _nccl(store: PrefixStore, rank: int, _own_host: str, timeout: timedelta) -> Group:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # absent from CPU builds of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("Group", ProcessGroupNCCL(store, rank, 2, options))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
