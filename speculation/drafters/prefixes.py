"""Texts that begin alike as trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.contexts import PAD
from speculation.tree import ROOT

LONGEST = 64
"""Tokens of a text, at most."""

_OF_TOKENS = np.random.default_rng(0x52).integers(0, 2**64, LONGEST + 1, np.uint64) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A node for each text and each beginning of one, in the order in which they come: parents first, and the whole of
    the first text before the second. Places are numbers in the texts' tokens, flattened."""

    first: NDArray[np.int64]  # [nodes] the place where each came first
    parents: NDArray[np.int64]  # [nodes] or ROOT
    places: NDArray[np.int64]  # all that are no PAD
    nodes: NDArray[np.int64]  # [places] which node each of them is


def prefixes(owners: NDArray[np.int64], tokens: NDArray[np.int64] | NDArray[np.int32]) -> Prefixes:
    """Of texts [n, length]; only those of one owner [n] share nodes. A text may begin and may end with PADs."""
    length = tokens.shape[1]
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _OF_TOKENS[:length]  # of a PAD 0
    paths = terms.cumsum(axis=1) + owners[:, None].astype(np.uint64) * _OF_TOKENS[-1]
    places = (tokens != PAD).reshape(-1).nonzero()[0]
    _, first, which = np.unique(paths.reshape(-1)[places], return_index=True, return_inverse=True)
    order = first.argsort()
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    nodes, first = number[which], places[first[order]]
    node_at = np.full(tokens.size, ROOT)
    node_at[places] = nodes
    parents = np.where(first % max(length, 1) > 0, node_at[first - 1], ROOT)
    return Prefixes(first, parents, places, nodes)
