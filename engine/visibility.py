"""What each row of a step sees: its context, what came before it, or in a token tree its ancestors, as far back as the
sliding window reaches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.step import StepBatch


class Visibility:
    """Of the layers of one window. A row sees no more than the last `window` positions, its own included; None: all.

    `trees` has for each sequence whose rows are no plain chain [rows, rows], true where a row sees another of the step.
    `first_blocks` [sequences] are the first blocks of their tables that a row of the sequence sees anything in.
    """

    def __init__(self, batch: StepBatch, block_size: int, window: int | None = None) -> None:
        self.window = window
        self.trees = _trees(batch)
        self.first_blocks = np.zeros_like(batch.context_lens)
        if window is not None:
            self.first_blocks = np.maximum(0, batch.context_lens - window + 1) // block_size
        self._firsts = self.first_blocks * block_size  # as logical indices
        self._batch = batch

    def of(self, sequences: list[int], width: int) -> NDArray[np.bool_]:
        """[sequences, rows of each, width]: which logical indices each row sees, from the first block on. The sequences
        have the same number of rows."""
        start, end = self._batch.query_starts[sequences[0] :][:2]
        rows = np.arange(end - start)
        contexts = self._batch.context_lens[sequences] - self._firsts[sequences]
        seen = np.arange(width) <= (contexts[:, None] + rows)[:, :, None]
        for index, sequence in enumerate(sequences):
            if (tree := self.trees.get(sequence)) is not None:
                context = int(contexts[index])
                seen[index, :, context : context + len(rows)] = tree
        if self.window is not None:
            seen &= self._within(self.window, sequences, rows, contexts, width)
        return seen

    def _within(
        self, window: int, sequences: list[int], rows: NDArray[np.int64], contexts: NDArray[np.int64], width: int
    ) -> NDArray[np.bool_]:
        """The window reaches over positions: in a tree these are not the logical indices."""
        own = self._batch.positions[self._batch.query_starts[sequences][:, None] + rows]  # [sequences, rows]
        row = np.arange(width) - contexts[:, None]  # [sequences, width] of which row a key is
        of_rows = np.take_along_axis(own, row.clip(0, len(rows) - 1), 1)
        indices = self._firsts[sequences][:, None] + np.arange(width)
        positions = np.where((row >= 0) & (row < len(rows)), of_rows, indices)
        within: NDArray[np.bool_] = positions[:, None] > own[:, :, None] - window
        return within


def _trees(batch: StepBatch) -> dict[int, NDArray[np.bool_]]:
    trees: dict[int, NDArray[np.bool_]] = {}
    if batch.tree_parents is None:
        return trees
    for sequence, (start, end) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
        parents = batch.tree_parents[start:end]
        if not np.array_equal(parents, np.arange(-1, len(parents) - 1)):
            seen = np.eye(len(parents), dtype=np.bool_)
            for row, parent in enumerate(parents.tolist()):
                if parent >= 0:
                    seen[row] |= seen[parent]
            trees[sequence] = seen
    return trees
