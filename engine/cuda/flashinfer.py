"""FlashInfer's kernels (arXiv:2501.01005) as a part of any step, and of captured ones.

Its page tables are ours with the length of the last page beside them, and a layer of KVPool, [2, blocks, block_size,
kv_heads, head_size], is its cache of keys and its cache of values in the layout it calls NHD. A wrapper is planned once
for all layers that attend alike: that lays out the work, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flashinfer
import numpy as np
import torch

from engine.attention import Part, Scoring
from engine.cuda.inputs import Inputs, Packed
from engine.cuda.tables import rows_of, tables_of
from engine.cuda.transfer import to_device
from engine.step import StepBatch

WORKSPACE_BYTES = 256 * 2**20
"""For partial results. Kernels of one stream run one after the other, so all share one."""
_LAYOUT = "NHD"

_workspaces: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device) -> torch.Tensor:
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _workspaces[device]


class FlashInfer:
    """Steps that are not captured. There is a wrapper for each way in which layers attend, kept from step to step:
    what it copies from its page-locked memory it must not let go of before the step is over."""

    def __init__(self, device: torch.device) -> None:
        self._workspace = workspace(device)
        self._wrappers: dict[tuple[int | None, Scoring], Any] = {}

    def parts(self, sequences: list[int], batch: StepBatch, cache: torch.Tensor, window: int | None) -> Iterator[Part]:
        yield _FlashInferPart(sequences, batch, cache, window, self)

    def wrapper(self, window: int | None, scoring: Scoring) -> Any:
        """Not planned yet for this step."""
        key = (window, scoring)
        if key not in self._wrappers:
            self._wrappers[key] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, _LAYOUT)
        return self._wrappers[key]


class _FlashInferPart:
    """Implements engine.attention.Part."""

    def __init__(
        self, sequences: list[int], batch: StepBatch, cache: torch.Tensor, window: int | None, owner: FlashInfer
    ) -> None:
        self.rows = rows_of(sequences, batch, cache.device)
        self._window = window
        self._owner = owner
        counts, self._block_size = np.diff(batch.query_starts)[sequences], cache.shape[3]
        lengths, table_starts, blocks = tables_of(sequences, batch, self._block_size)
        self._starts = _ints(np.concatenate(([0], np.cumsum(counts))))
        self._tables = (_ints(table_starts), to_device(blocks, cache.device), _last_pages(lengths, self._block_size))
        self._planned: dict[Scoring, Any] = {}

    def __call__(self, query: torch.Tensor, kv: torch.Tensor, cache: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        query = query[self.rows].contiguous()
        wrapper = self._planned.get(scoring) or self._plan(query, kv.shape[2], scoring)
        keys, values = cache.view(2, -1, *cache.shape[1:])
        mixed: torch.Tensor = wrapper.run(query, (keys, values))
        return mixed.flatten(1)

    def _plan(self, query: torch.Tensor, kv_heads: int, scoring: Scoring) -> Any:
        wrapper = self._owner.wrapper(self._window, scoring)
        heads, head_size = query.shape[1:]
        wrapper.plan(
            self._starts,
            *self._tables,
            heads,
            kv_heads,
            head_size,
            self._block_size,
            causal=True,  # aligned at the end: the last row sees all of its sequence
            **_law(self._window, scoring, query.dtype),
        )
        self._planned[scoring] = wrapper
        return wrapper


class StaticFlashInfer:
    """Implements engine.cuda.paged.StaticPaged. Each way in which layers attend, found when the step is first run, has
    a wrapper whose kernels are in the graph, and which is planned anew before each replay."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._packed: Packed | None = None
        self._wrappers: dict[tuple[Any, ...], Any] = {}

    def prepare(self, packed: Packed) -> None:
        self._packed = packed
        for key, wrapper in self._wrappers.items():
            self._plan(wrapper, *key)

    def __call__(self, query: torch.Tensor, cache: torch.Tensor, window: int | None, scoring: Scoring) -> torch.Tensor:
        rows, heads, head_size = query.shape
        key = (window, scoring, heads, cache.shape[3], head_size, cache.shape[2], query.dtype)
        if key not in self._wrappers:
            self._wrappers[key] = wrapper = self._wrapper(rows, cache.device)
            self._plan(wrapper, *key)
        mixed: torch.Tensor = self._wrappers[key].run(query.contiguous(), (cache[0], cache[1]))
        return mixed.flatten(1)

    def _wrapper(self, rows: int, device: torch.device) -> Any:
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace(device),
            _LAYOUT,
            use_cuda_graph=True,
            use_tensor_cores=True,  # which take the query heads of a group together
            paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.zeros_like(self._inputs.blocks),
            paged_kv_last_page_len_buffer=torch.ones(rows, dtype=torch.int32, device=device),
        )

    def _plan(
        self,
        wrapper: Any,
        window: int | None,
        scoring: Scoring,
        heads: int,
        kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        packed = self._packed
        assert packed is not None, "prepare comes before the first run"
        wrapper.plan(
            _ints(packed.table_starts),
            self._inputs.blocks[: int(packed.table_starts[-1])],  # already on the device
            _last_pages(packed.lengths, block_size),
            heads,
            kv_heads,
            head_size,
            block_size,
            **_law(window, scoring, dtype),
        )


def _law(window: int | None, scoring: Scoring, dtype: torch.dtype) -> dict[str, Any]:
    """A window of 1 sees its own position only, and has none to its left."""
    scale, softcap = scoring
    return {
        "window_left": -1 if window is None else window - 1,
        "sm_scale": scale,
        "logits_soft_cap": softcap,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


def _last_pages(lengths: np.ndarray, block_size: int) -> torch.Tensor:
    return _ints((lengths - 1) % block_size + 1)


def _ints(values: np.ndarray) -> torch.Tensor:
    """On the host, where plans are made."""
    return torch.from_numpy(values.astype(np.int32))
