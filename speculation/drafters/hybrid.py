"""All that is known without training, in one law: the request's own text (as in prompt lookup), what the target thought
of it and of other requests' contexts (Token Recycling, ADED's tri-grams), and longer contexts where there are any.

For each node the target's next token is predicted by mixing (mixture.py) what followed the last 1, 2 and 4 tokens in
any request of the scope with what followed the last 1, 2, 4 and 8 in the request itself; the tree is the worthiest one
under the budget (growth.py). So it follows a copied passage far, and spreads where it only knows what is common.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from speculation.drafters.base import Surroundings
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts
from speculation.drafters.recycling import RecyclingDrafter


class Hybrid(RecyclingDrafter):
    name: ClassVar[str] = "hybrid"
    contexts = Contexts((1, 1, 2, 2, 4, 4, 8), (SHARED, PRIVATE, SHARED, PRIVATE, SHARED, PRIVATE, PRIVATE))
    of_text = contexts.only(PRIVATE)
    # Fitted on generations of a 135M model over Spec-Bench; the optimum is flat.
    doubts = np.array([4.3, 4.0, 3.75, 1.3, 4.3, 0.35, 0.03], np.float32)
    fading = 0.55


def build(surroundings: Surroundings) -> Hybrid:
    return Hybrid(surroundings)
