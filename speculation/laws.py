"""By which law draft tokens were drawn. What a rule may do with a draft, and whether the output then still follows the
target's law, depends on this and on nothing else about the drafter. No torch: the launcher checks names by it."""

from __future__ import annotations

from enum import StrEnum


class DraftLaw(StrEnum):
    """How the children of a node came to be, given everything that was drawn before them."""

    POINT_MASS = "point_mass"
    """They were not drawn, or by random numbers that no rule knows of: lookups, the top k of a score, a sample that was
    cut down by what was in it."""
    IID = "iid"
    """Independently from q; the same token may come more than once."""
    WITHOUT_REPLACEMENT = "without_replacement"
    """One after the other from q, without those that had come before."""


SAMPLED = frozenset({DraftLaw.IID, DraftLaw.WITHOUT_REPLACEMENT})
"""Laws that come with a q."""
