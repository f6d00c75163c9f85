"""What the ranks of a group say to each other while they compute: sums and gathers within a stage, hidden states from
stage to stage. Process groups are made one by one, over gloo between CPU processes and NCCL between CUDA devices; there
is no default group, so a process may belong to any number of them.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
from torch._C._distributed_c10d import FileStore, GatherOptions, PrefixStore, ProcessGroupGloo, Store, Work

from engine.parallel.split import WHOLE, Split

_TIMEOUT = timedelta(hours=1)
"""Not how a dead or hung rank is noticed: whoever leads the group does that and ends its processes."""
_LOOPBACK = "127.0.0.1"
"""The ranks of a group are on one host."""


class Backend(Protocol):
    """The part of a torch process group that is used here."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: GatherOptions) -> Work: ...

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...


class Group:
    """The group as one of its ranks sees it. `tensor` joins the ranks of its stage, `pipe` those with its tp_rank in
    every stage; None where there is nobody to talk to."""

    def __init__(self, split: Split, tensor: Backend | None = None, pipe: Backend | None = None) -> None:
        self.split = split
        self._tensor = tensor
        self._pipe = pipe

    def sum_(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of the stage, in place; `partial` is contiguous."""
        if self._tensor is not None:
            self._tensor.allreduce([partial]).wait()
        return partial

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[rows, n] of every rank of the stage beside each other, [rows, n * tp_size], at tp_rank 0. Zeros
        elsewhere, so that whoever goes on with them makes the same calls on every rank."""
        if self._tensor is None:
            return part
        root, part = self.split.tp_rank == 0, part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.split.tp_size)] if root else []
        options = GatherOptions()
        options.rootRank = 0
        self._tensor.gather([parts] if root else [], [part], options).wait()
        return torch.cat(parts, -1) if root else part.new_zeros(len(part), part.shape[-1] * self.split.tp_size)

    def send(self, hidden: torch.Tensor) -> None:
        """To the next stage. Returns when that has taken it, so a stage is at most one step ahead of the next."""
        if self._pipe is not None:
            self._pipe.send([hidden.contiguous()], self.split.pp_rank + 1, 0).wait()

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        """What the stage before has sent; `into` has its shape and dtype."""
        if self._pipe is not None:
            self._pipe.recv([into], self.split.pp_rank - 1, 0).wait()
        return into


ALONE = Group(WHOLE)
"""The group of a model on one device."""


def connect(split: Split, meeting: str | Path, device: torch.device) -> Group:
    """Meet the other ranks at the file `meeting`, which is of this group alone. Returns when all are connected."""
    store = FileStore(str(meeting), split.ranks)
    make = _nccl if device.type == "cuda" else _gloo
    tensor = pipe = None
    if split.tp_size > 1:
        tensor = make(PrefixStore(f"tensor/{split.pp_rank}", store), split.tp_rank, split.tp_size)
    if split.pp_size > 1:
        pipe = make(PrefixStore(f"pipe/{split.tp_rank}", store), split.pp_rank, split.pp_size)
    return Group(split, tensor, pipe)


def _gloo(store: Store, rank: int, size: int) -> Backend:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _TIMEOUT
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    return cast("Backend", ProcessGroupGloo(store, rank, size, options))


def _nccl(store: Store, rank: int, size: int) -> Backend:
    from torch._C._distributed_c10d import ProcessGroupNCCL  # absent from CPU builds of torch

    options = ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return cast("Backend", ProcessGroupNCCL(store, rank, size, options))
