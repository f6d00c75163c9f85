"""Changes in traffic: false alarms come as rarely as is said, and what has changed is noticed soon."""

from __future__ import annotations

import math

import numpy as np
import pytest

from placement.drift import LEAST_COMPARED, SLIGHT, RateWatch, changed_at, lengths_differ
from placement.workload import Workload

SECONDS = 0.5


def counts(rate: float, shape: float, requests: int, rng: np.random.Generator) -> list[int]:
    """Of gamma gaps, in every half second."""
    times = np.cumsum(rng.gamma(shape, 1 / (shape * rate), requests))
    return np.histogram(times, np.arange(0.0, times[-1], SECONDS))[0].tolist()


def watch(rate: float, shape: float = 1.0, known_from: float = math.inf, **options: float) -> RateWatch:
    made = RateWatch(**options)
    made.expect(rate, known_from, shape)
    return made


def requests_to_alarm(watching: RateWatch, arrived: list[int]) -> tuple[int, float | None]:
    """How many requests had come, and for how long the rate is said to be another; None without an alarm."""
    seen = 0
    for count in arrived:
        seen += count
        if (for_s := watching.tell(count, SECONDS)) is not None:
            return seen, for_s
    return seen, None


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0], ids=["bursty", "Poisson", "even"])
def test_false_alarms_of_a_rate_are_no_more_often_than_said(shape: float) -> None:
    """One in 2,000 requests at the most: in 200,000 there are then 100, give or take three times ten."""
    alarms, arrived = 0, counts(10.0, shape, 200_000, np.random.default_rng(1))
    watching = watch(10.0, shape, mean_requests=2000)
    for count in arrived:
        if watching.tell(count, SECONDS) is not None:
            alarms, watching = alarms + 1, watch(10.0, shape, mean_requests=2000)
    assert alarms <= 130


@pytest.mark.parametrize("times", [2.0, 0.5])
def test_a_rate_that_has_changed_is_noticed_after_a_bound_of_requests(times: float) -> None:
    """By Lorden about h / D requests, where D is what one of them tells: here twice that, on average of 50 runs."""
    factor, rng = 1.5, np.random.default_rng(3)
    tells = math.log(factor) - (factor - 1) / times if times > 1 else (1 - 1 / factor) / times - math.log(factor)
    runs = [requests_to_alarm(watch(10.0), counts(10.0 * times, 1.0, 3000, rng)) for _ in range(50)]
    assert all(for_s is not None for _, for_s in runs)
    assert np.mean([seen for seen, _ in runs]) < 2 * math.log(2e5) / tells


def test_it_is_said_since_when_the_rate_is_another() -> None:
    rng, said = np.random.default_rng(4), []
    for _ in range(30):
        watching = watch(10.0)
        before, after = counts(10.0, 1.0, 2000, rng), counts(20.0, 1.0, 2000, rng)
        assert requests_to_alarm(watching, before)[1] is None
        seen, for_s = requests_to_alarm(watching, after)
        assert for_s is not None
        said.append(for_s - seen / 20.0)
    assert np.median(np.abs(said)) < 2.0


@pytest.mark.parametrize("shape", [0.25, 1.0])
def test_that_a_rate_was_not_known_well_is_no_change(shape: float) -> None:
    """Learnt from 100 requests it is off by a tenth, or two if they are bursty."""
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(40):
        learnt = 100 / rng.gamma(shape, 1 / (shape * 10.0), 100).sum()
        alarms += requests_to_alarm(watch(learnt, shape, 100), counts(10.0, shape, 2000, rng))[1] is not None
    assert alarms <= 4
    assert requests_to_alarm(watch(10.0, shape, 100), counts(30.0, shape, 2000, rng))[1] is not None


def lengths(rng: np.random.Generator, count: int, prompt: float = 300.0, output: float = 80.0) -> Workload:
    """Lognormal, and longer prompts have longer outputs."""
    first, second = rng.normal(size=(2, count))
    prompts, outputs = prompt * np.exp(0.8 * first), output * np.exp(0.6 * (0.5 * first + second))
    return Workload(np.maximum(1, prompts).astype(np.int32), np.maximum(1, outputs).astype(np.int32), np.ones(count))


def share_told(seed: int, tests: int, slight: float = SLIGHT, now: int = 60, **changed: float) -> float:
    """Of tests that may be wrong in one of twenty."""
    rng, told = np.random.default_rng(seed), 0
    for _ in range(tests):
        samples = lengths(rng, 200), lengths(rng, now, **changed)
        told += lengths_differ(*samples, false_alarms=0.05, slight=slight, rng=rng)
    return told / tests


def test_false_alarms_of_lengths_have_the_share_said() -> None:
    """Of 600 tests 5 % are 30, give or take three times 5.3."""
    assert 0.02 < share_told(6, 600, slight=0.0) < 0.077
    assert share_told(6, 600) < 0.077


def test_a_slight_difference_is_none_however_sure_it_is() -> None:
    assert share_told(11, 30, slight=0.0, now=200, prompt=375.0) > 0.6
    assert share_told(11, 30, now=200, prompt=375.0) < 0.1


@pytest.mark.parametrize(("changed", "least"), [({"prompt": 600.0}, 0.95), ({"output": 160.0}, 0.95)])
def test_lengths_that_have_doubled_are_noticed_in_sixty_requests(changed: dict[str, float], least: float) -> None:
    assert share_told(7, 60, **changed) >= least


def test_that_lengths_go_together_otherwise_is_noticed_though_each_has_its_law() -> None:
    rng = np.random.default_rng(8)
    together = np.exp(rng.normal(5.0, 1.0, 200)).astype(np.int32) + 1
    apart = Workload(together, rng.permutation(together), np.ones(200))
    assert lengths_differ(Workload(together, together, np.ones(200)), apart, rng=rng)


def test_requests_that_are_all_alike_are_no_change() -> None:
    alike, rng = Workload(np.full(50, 9, np.int32), np.full(50, 9, np.int32), np.ones(50)), np.random.default_rng(0)
    assert not lengths_differ(alike, alike, rng=rng)
    assert lengths_differ(alike, alike.scaled(0.5, 1.0), rng=rng)


def test_few_requests_tell_nothing() -> None:
    rng = np.random.default_rng(9)
    assert not lengths_differ(lengths(rng, 200), lengths(rng, LEAST_COMPARED - 1, prompt=1e6), rng=rng)


def test_the_place_of_a_change_is_found() -> None:
    rng = np.random.default_rng(10)
    for place in (10, 40, 70):
        before, after = lengths(rng, place), lengths(rng, 80 - place, prompt=50.0, output=500.0)
        both = Workload(
            np.concatenate([before.prompt_tokens, after.prompt_tokens]),
            np.concatenate([before.output_tokens, after.output_tokens]),
            np.ones(80),
        )
        assert abs(changed_at(both) - place) <= 3
