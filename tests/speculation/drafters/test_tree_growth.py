"""How trees are found, against finding them one node at a time."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speculation.drafters.growth import Branches, grow
from speculation.drafters.mixture import mixed
from speculation.drafters.search import EXPLORATION, search, share_out
from speculation.laws import DraftLaw
from tests.speculation.drafters.replays import paths

TOKENS, REQUESTS = 6, 3
LAWS = np.random.default_rng(4).dirichlet(np.full(TOKENS, 0.4), (REQUESTS, TOKENS)).astype(np.float32) * np.float32(
    0.95
)
"""[requests, last token, next token]"""


def follow(requests: NDArray[np.int64], windows: NDArray[np.int64]) -> Branches:
    laws = LAWS[requests, windows[:, -1]]
    nodes, tokens = laws.nonzero()
    return Branches(nodes, tokens, laws[nodes, tokens])


def expand(requests: NDArray[np.int64], windows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    laws = LAWS[requests, windows[:, -1]]
    return np.broadcast_to(np.arange(TOKENS, dtype=np.int32), laws.shape), laws


def one_by_one(request: int, root: int, budget: int, floor: float) -> list[tuple[tuple[int, ...], float]]:
    """Paths and their probabilities, always the likeliest next."""
    open_, found = [(-1.0, ())], list[tuple[tuple[int, ...], float]]()
    while open_ and len(found) <= budget:
        worth, path = heapq.heappop(open_)
        found.append((path, -worth))
        for token, chance in enumerate(LAWS[request, path[-1] if path else root].tolist()):
            if -worth * chance >= floor:
                heapq.heappush(open_, (worth * chance, (*path, token)))
    return found[1:]


def probability(request: int, root: int, path: tuple[int, ...]) -> float:
    return float(np.prod([LAWS[request, last, token] for last, token in pairwise((root, *path))]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, TOKENS - 1), min_size=REQUESTS, max_size=REQUESTS),
    st.lists(st.integers(0, 25), min_size=REQUESTS, max_size=REQUESTS),
    st.sampled_from([0.001, 0.05, 0.3]),
)
def test_growing_by_levels_finds_the_worthiest_trees(roots: list[int], budgets: list[int], floor: float) -> None:
    drafts = grow(
        follow,
        np.array(roots)[:, None],
        np.array(budgets),
        floor,
        branches=True,
        law=DraftLaw.POINT_MASS,
        drafter="grown",
    )
    drafts.validate(TOKENS)
    worths = drafts.path_products(drafts.confidence)
    for request, (root, budget) in enumerate(zip(roots, budgets, strict=True)):
        expected = one_by_one(request, root, budget, floor)
        own = worths[drafts.offsets[request] : drafts.offsets[request + 1]]
        assert own.tolist() == pytest.approx([worth for _, worth in expected], rel=1e-4)
        assert [probability(request, root, path) for path in paths(drafts, request)] == pytest.approx(own, rel=1e-4)


def test_without_branches_it_is_the_likeliest_chain() -> None:
    drafts = grow(follow, np.array([[0]]), np.array([5]), 0.0, branches=False, law=DraftLaw.POINT_MASS, drafter="grown")
    token, expected = 0, []
    for _ in range(drafts.num_nodes):
        token = int(LAWS[0, token].argmax())
        expected.append(token)
    assert drafts.tokens.tolist() == expected
    assert drafts.chains.all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7]), min_size=1, max_size=6), st.integers(0, 20))
def test_simulations_are_shared_out_as_if_they_came_one_after_the_other(priors: list[float], simulations: int) -> None:
    visits = np.zeros(len(priors), np.int64)
    law = np.array(priors, np.float32)

    def scores(times: NDArray[np.int64]) -> NDArray[np.float32]:
        return law * (1 + EXPLORATION * np.sqrt(np.float32(simulations)) / times.astype(np.float32))

    def taken(counts: NDArray[np.int64]) -> list[float]:
        """The scores that went, best first: two that are as good as equal may go either way."""
        each = [scores(np.full(len(law), turn + 1))[counts > turn] for turn in range(simulations)]
        return sorted(np.concatenate(each).tolist() if each else [], reverse=True)

    for _ in range(simulations if law.any() else 0):
        visits[scores(visits + 1).argmax()] += 1
    shared = share_out(law[None], np.array([simulations]))[0]
    assert taken(shared) == pytest.approx(taken(visits), rel=1e-6)
    assert not shared[law == 0].any()


def test_a_search_looks_at_several_branches_and_follows_the_likely_ones_far() -> None:
    drafts = search(expand, np.array([[0]]), np.array([20]), 0.0, law=DraftLaw.POINT_MASS, drafter="searched")
    drafts.validate(TOKENS)
    assert drafts.num_nodes <= 20
    found = paths(drafts)
    assert sum(len(path) == 1 for path in found) > 1
    likeliest = one_by_one(0, 0, 4, 0.0)
    assert {path for path, _ in likeliest} <= set(found)
    assert max(map(len, found)) >= 4


def test_a_context_leaves_what_it_is_not_sure_of_to_shorter_ones() -> None:
    tokens, weights = np.zeros((2, 2, 8), np.int32), np.zeros((2, 2, 8), np.float32)
    tokens[:, 0, :2], weights[:, 0, :2] = [1, 2], [3.0, 1.0]
    tokens[0, 1, 0], weights[0, 1, 0] = 2, 1.0
    law = mixed(tokens, weights, np.array([1.0, 0.5], np.float32))
    chances = {
        (w, t): c for w, t, c in zip(law.windows.tolist(), law.tokens.tolist(), law.chances.tolist(), strict=True)
    }
    # The longer context has 1 / (1 + 0.5) of window 0; of the third that is left the shorter one has 4 / (4 + 1).
    assert chances == pytest.approx(
        {(0, 1): 1 / 3 * 4 / 5 * 3 / 4, (0, 2): 2 / 3 + 1 / 3 * 4 / 5 * 1 / 4, (1, 1): 4 / 5 * 3 / 4, (1, 2): 4 / 5 / 4}
    )
