"""Whether lengths have become longer or shorter, told by lengths of which some are not known to their end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placement.workload import Times

LEAST_ENDED = 20
"""With fewer lengths that are known to their end nothing is told."""


class Survival:
    """S(x), the share of lengths above x, by the product-limit estimate (Kaplan and Meier, 1958) of lengths of which
    those that have not `ended` will be longer than they are. It is reckoned as if one more were longer than all: S is
    never 0, so that lengths beyond all that were known have a likelihood."""

    def __init__(self, lengths: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        enough = ended.sum() >= LEAST_ENDED
        self._at, ends = np.unique(lengths[ended & enough], return_counts=True)
        as_long = len(lengths) - np.searchsorted(np.sort(lengths), self._at)
        self._logarithms = np.concatenate([[0.0], np.cumsum(np.log1p(-ends / (as_long + 1)))])
        self._off = min(0.9, 3 / np.sqrt(max(1, ends.sum())))

    def likelier(self, lengths: NDArray[np.int64], ended: NDArray[np.bool_], powers: Times) -> Times:
        """Logarithm of how many times as likely each of these is under the law S ** power as under S: a power below 1
        has longer lengths, one above 1 shorter ones (Lehmann, 1953). Lengths in tokens tie, so each weighs what S loses
        at it (Kalbfleisch and Prentice, 1973). S itself is a power of what was learnt, of which as many have ended as
        tell it within three standard errors: it is taken to be the end of this range that `power` tends to. Beyond the
        longest that has ended nothing is known of S, but that it is longer. # [powers, lengths]"""
        power = powers[:, None]
        of = np.where(power < 1, 1 - self._off, 1 + self._off)
        ended = ended & (lengths <= self._at.max(initial=0))
        before = of * self._logarithms[np.searchsorted(self._at, lengths, side="left")]
        after = of * self._logarithms[np.searchsorted(self._at, lengths, side="right")]
        lost = np.minimum(after - before, -1e-9)  # next to nothing where S is flat: the ratio is the limit, the power
        at_its_end = (power - 1) * before + np.log(np.expm1(power * lost) / np.expm1(lost))
        found: Times = np.where(ended, at_its_end, (power - 1) * after)
        return found
