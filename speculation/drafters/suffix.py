"""SuffixDecoding (arXiv:2411.04975): where the end of the text occurred before, in this request or in others of its
scope, and a tree of what came after it by how often it did.

The paper keeps suffix trees, one per request and one over all. Here one index of recent text (texts.py) finds the same
occurrences, by the longest of a few lengths of context, in bounded memory. More of a text is drafted the longer what
has matched.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts
from speculation.drafters.lookup import LookupDrafter


class Suffix(LookupDrafter):
    name: ClassVar[str] = "suffix"
    contexts = Contexts((2, 2, 4, 4, 8, 8, 16), (SHARED, PRIVATE, SHARED, PRIVATE, SHARED, PRIVATE, PRIVATE))
    doubts = np.array([3.0, 1.0, 2.0, 0.4, 0.2, 0.05, 0.02], np.float32)
    most = 8


def build(surroundings: Surroundings) -> Suffix:
    return Suffix(surroundings)
