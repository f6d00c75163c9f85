"""Rejection along a chain (arXiv:2211.17192, arXiv:2302.01318): accept x with probability min(1, p(x) / q(x)), else
draw from (p - q)+ normalised and stop. All accepted: one more token from p.

It is tree.py's rule for one child a node, where the three laws differ no more.
"""

from __future__ import annotations

from core.errors import InternalError
from speculation.protocols import Dice
from speculation.rounds import Outcome, TargetRows
from speculation.rules import tree
from speculation.tree import DraftBatch


def verify(drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
    if not drafts.chains.all():
        raise InternalError(f"drafter {drafts.drafter} proposed a tree to rule chain: make it without branches")
    return tree.verify(drafts, rows, dice)
