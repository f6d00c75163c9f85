"""DistServe's search: what it enumerates, how it bisects, what it refuses."""

from __future__ import annotations

import pytest

from placement.distserve import (
    Bisection,
    Cluster,
    Criterion,
    DistServeModel,
    SharedSplit,
    Split,
    algorithm_1,
    algorithm_2,
    colocated,
    search,
)
from placement.outcome import Targets
from tests.placement.pipelines import SMALL, azure_like

MODEL = DistServeModel(
    layers=4, heads=4, latency={1: SMALL, 2: SMALL}, prefill_caps={(tp, pp): 9000 for tp in (1, 2) for pp in (1, 2, 4)}
)


def test_algorithm_1_puts_the_phases_anywhere() -> None:
    splits = list(algorithm_1(MODEL, Cluster(2, 2)))
    assert Split(1, 1, 1, 1, 2) in splits
    assert len(splits) == 9
    assert all(split.pp_cross == 1 and split.devices <= 4 for split in splits)
    assert Split(1, 1, 3, 1, 1) not in splits  # three stages don't divide four layers


def test_algorithm_2_keeps_a_segment_in_a_node() -> None:
    assert list(algorithm_2(MODEL, Cluster(2, 2))) == [Split(1, 1, 1, 1, 1), Split(2, 1, 1, 1, 1)]
    assert Split(2, 1, 4, 1, 1) not in list(algorithm_2(MODEL, Cluster(2, 8)))  # eight stages, four layers


def test_one_pipeline_for_both_phases_is_enumerated_too() -> None:
    assert list(colocated(MODEL, Cluster(2, 2))) == [
        *(SharedSplit(1, 1), SharedSplit(1, 2), SharedSplit(1, 4)),
        *(SharedSplit(2, 1), SharedSplit(2, 2)),
    ]


@pytest.mark.parametrize(("limit", "best"), [(3.3, 3.0), (-1.0, 0.0), (9.0, 7.0)])
def test_bisection_keeps_the_last_rate_that_passes(limit: float, best: float) -> None:
    tried = []

    def passes(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    assert Bisection(8.0, 1.0).best(passes) == best
    assert len(tried) == 3


def test_bisection_ends_where_there_is_no_further_number_between_two() -> None:
    assert Bisection(8.0, 1e-300).best(lambda rate: rate <= 3.0) == 3.0


def test_the_best_split_has_the_highest_rate_then_the_fewest_devices() -> None:
    found = search(
        algorithm_1, MODEL, Cluster(1, 4), azure_like(60), Criterion(Targets(400.0, 60.0)), Bisection(8.0, 0.25)
    )
    ranked = list(found.goodput.items())
    assert found.best == ranked[0][0]
    keys = [(-rate, split.devices) for split, rate in ranked]
    assert keys == sorted(keys)
    assert ranked[0][1] > ranked[-1][1] > 0


def test_splits_that_cannot_run_are_refused_with_the_reason() -> None:
    model = DistServeModel(layers=4, heads=4, latency={1: SMALL}, prefill_caps={(1, 1): 9000})
    found = search(
        algorithm_1, model, Cluster(1, 4), azure_like(10), Criterion(Targets(400.0, 60.0)), Bisection(8.0, 4.0)
    )
    assert "no profile for TP 2; there is one for TP 1" in found.refused[Split(1, 2, 1, 1, 1)]
    assert "TP 1 and PP 2" in found.refused[Split(1, 1, 2, 1, 1)]
    assert set(found.goodput) == {Split(1, 1, 1, 1, 1), Split(1, 1, 1, 1, 2)}


def test_prompts_too_long_for_every_batch_refuse_every_split() -> None:
    model = DistServeModel(layers=1, heads=1, latency={1: SMALL}, prefill_caps={(1, 1): 100})
    found = search(
        algorithm_1, model, Cluster(1, 2), azure_like(10), Criterion(Targets(400.0, 60.0)), Bisection(8.0, 4.0)
    )
    assert found.best is None
    assert "doesn't fit a prefill batch of 100" in found.refused[Split(1, 1, 1, 1, 1)]
