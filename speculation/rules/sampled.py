"""Sampled verify: the target draws a token y in every row; the path goes to the child that is y, and y is emitted.

So what is emitted is what the target draws, whatever was proposed: lossless for every law, and with the sampler's
random numbers the very text of plain decoding.
"""

from __future__ import annotations

from speculation.protocols import Dice
from speculation.rounds import Outcome, TargetRows
from speculation.rules.walk import follow
from speculation.tree import DraftBatch


def verify(drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:  # noqa: ARG001
    return Outcome.of(drafts, *follow(drafts, rows.tokens))
