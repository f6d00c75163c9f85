"""Whether counts can have come from a law."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def p_value(counts: NDArray[np.int64], expected: Sequence[float] | NDArray[np.float64]) -> float:
    """Chi-square upper tail by the Wilson-Hilferty approximation."""
    n, probs = counts.sum(), np.array(expected)
    assert counts[probs == 0].sum() == 0, "an impossible token was drawn"
    counts, probs = counts[probs > 0], probs[probs > 0]
    statistic, k = ((counts - n * probs) ** 2 / (n * probs)).sum(), len(probs) - 1
    if k == 0:
        return 1.0
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))
