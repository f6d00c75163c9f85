"""Prompt lookup: the text that came after the last occurrences of what the request ends with, in itself. The longest
context that occurred decides; of its occurrences the last ones make a small tree."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import PRIVATE, Contexts
from speculation.drafters.lookup import LookupDrafter


class PromptLookup(LookupDrafter):
    name: ClassVar[str] = "prompt_lookup"
    contexts = Contexts((1, 2, 3, 4, 8), (PRIVATE,) * 5)
    doubts = np.array([1.0, 0.5, 0.3, 0.1, 0.05], np.float32)
    most = 4


def build(surroundings: Surroundings) -> PromptLookup:
    return PromptLookup(surroundings)
