"""What Medusa's and Hydra's drafters have in common: they go by the last hidden state that the target has computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import TransferError
from speculation.drafters.base import Surroundings
from speculation.heads.checkpoint import Checkpoint
from speculation.heads.drafter import HeadDrafter
from speculation.heads.medusa import Heads
from speculation.packing import expect
from speculation.rounds import DraftRequest, Feedback, Observed


class LastRowDrafter(HeadDrafter):
    only_latest: ClassVar[bool] = True

    def __init__(self, surroundings: Surroundings, checkpoint: Checkpoint) -> None:
        super().__init__(surroundings, checkpoint)
        self.heads = self.network(Heads, checkpoint)
        self._rows: dict[int, tuple[int, torch.Tensor]] = {}
        """By request: an index into its tokens, and the hidden state there."""

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        (tap,) = self.config.taps
        rows = observed.taps[tap]
        for request, start, end in zip(requests, observed.offsets, observed.offsets[1:], strict=False):
            if start < end:
                self._rows[request.key] = int(observed.indices[end - 1]), rows[end - 1].clone()

    def observe(self, feedback: Feedback) -> None:
        self.absorb(feedback.requests, feedback.observed)

    def finish(self, key: int) -> None:
        self._rows.pop(key, None)

    def ready(self, requests: Sequence[DraftRequest]) -> NDArray[np.bool_]:
        """Those of which the token before the root has been computed here."""
        indices = [self._rows[one.key][0] if one.key in self._rows else -1 for one in requests]
        last = [len(one.token_ids) - 2 for one in requests]
        return np.array([own == index for own, index in zip(indices, last, strict=True)], np.bool_)

    def entered(self, requests: Sequence[DraftRequest]) -> torch.Tensor:
        """[requests, hidden] what heads read."""
        return self.heads.enter(torch.stack([self._rows[request.key][1] for request in requests]))

    def pack(self, key: int) -> dict[str, torch.Tensor]:
        if key not in self._rows:
            return {}
        index, row = self._rows[key]
        return {"index": torch.tensor([index]), "hidden": row}

    def unpack(self, request: DraftRequest, state: dict[str, torch.Tensor]) -> None:
        index = expect(state, "index", torch.int64, 1)
        row = expect(state, "hidden", self.surroundings.dtype, self.config.hidden_size)
        if not 0 <= int(index) < len(request.token_ids):
            raise TransferError(f"index {int(index)} of the draft state is beyond the text")
        self._rows[request.key] = int(index), row.to(self.surroundings.device)
