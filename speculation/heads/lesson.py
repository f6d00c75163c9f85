"""Passages as heads are trained and measured on them: flat, with the tokens that a head can propose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speculation.heads.passages import Passage

NO_TOKEN = -1
"""In place of a token that the head can't propose."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Passages one after the other. At depth d, from 0 on, the head that starts from row r predicts the token d + 2
    further: it has the hidden state of row r, and then is told the d + 1 tokens after it."""

    tokens: torch.Tensor  # [tokens] of the target's vocabulary
    features: torch.Tensor  # [tokens, taps, hidden]; zeros for the last token of a passage
    offsets: tuple[int, ...]  # [passages + 1]
    rows: torch.Tensor  # [rows] where a head starts: of each passage a run
    ends: torch.Tensor  # [rows] one past the last token of the passage
    law_ids: torch.Tensor  # [tokens, top] of the head's vocabulary, or NO_TOKEN: what the target says after each
    laws: torch.Tensor  # [tokens, top] float32 probabilities

    def token(self, depth: int) -> torch.Tensor:
        """[rows] the last one that is known at this depth."""
        return self.tokens[self._at(depth + 1)]

    def next_token(self, depth: int) -> torch.Tensor:
        """[rows] the one to predict, where `there`."""
        return self.tokens[self._at(depth + 2)]

    def there(self, depth: int) -> torch.Tensor:
        """[rows] whether the text has a token to predict."""
        return self.rows + depth + 2 < self.ends

    def law(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, top] ids and probabilities of the token to predict."""
        at = self._at(depth + 1)
        return self.law_ids[at], self.laws[at]

    def _at(self, distance: int) -> torch.Tensor:
        return torch.minimum(self.rows + distance, self.ends - 1)


def make_lesson(passages: Sequence[Passage], ids: torch.Tensor, sharpness: float) -> Lesson:
    """`ids` [vocab]: each token in the head's vocabulary, or
    NO_TOKEN. Laws are raised to the power of `sharpness`, and not normalised over what the head can propose."""
    offsets, rows, ends, features, law_ids, laws = [0], [], [], [], [], []
    for passage in passages:
        start, count, top = offsets[-1], len(passage.token_ids), passage.top_ids.shape[1]
        rows.append(torch.arange(start + passage.first, start + count - 2))
        ends.append(torch.full((len(rows[-1]),), start + count))
        features.append(torch.cat((passage.taps, torch.zeros_like(passage.taps[:1]))))
        own_ids = torch.full((count, top), NO_TOKEN)
        own_laws = torch.zeros(count, top)
        own_ids[passage.first : count - 1] = ids[passage.top_ids]
        own_laws[passage.first : count - 1] = (passage.top_logprobs * sharpness).softmax(-1)
        law_ids.append(own_ids)
        laws.append(own_laws)
        offsets.append(start + count)
    tokens = torch.cat([passage.token_ids for passage in passages])
    return Lesson(
        tokens,
        torch.cat(features),
        tuple(offsets),
        torch.cat(rows),
        torch.cat(ends),
        torch.cat(law_ids),
        torch.cat(laws),
    )
