"""Workers on one machine slow each other down while both compute."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import ConfigError
from placement import native
from placement.fit import Point, fit_contention
from placement.latency import Contention
from placement.layout import Layout, Role
from placement.serving import Served, serve_plainly
from tests.placement.layouts import group
from tests.placement.pipelines import workload

SLOW = Contention(prompt=(1.5, 1.5), decode=(2.0, 2.0))


def served(layout: Layout, prompts: list[int], outputs: list[int], at_ms: list[float]) -> Served:
    gaps = np.diff(at_ms, prepend=0.0) / 1000
    return serve_plainly(layout, workload(prompts, outputs, gaps.tolist()), 1.0)


def test_a_worker_that_is_alone_is_as_fast_as_it_was_profiled() -> None:
    layout = Layout((group(Role.BOTH, contention=SLOW),) * 2)
    assert served(layout, [100], [3], [0.0]).outcome.e2e_ms == pytest.approx([32.0])


def test_two_that_compute_all_the_time_take_as_long_as_that_costs() -> None:
    """Prompts of 20 ms take 30, and the decodes of 6 ms take 12."""
    layout = Layout((group(Role.BOTH, contention=SLOW),) * 2)
    found = served(layout, [100, 100], [3, 3], [0.0, 0.0])
    assert found.outcome.ttft_ms == pytest.approx([30.0, 30.0])
    assert found.outcome.tpot_ms == pytest.approx([12.0, 12.0])


def test_only_the_time_beside_the_other_is_slow() -> None:
    """The first prompt does 8 of its 20 ms alone, then 12 at two thirds of the speed; the other the last 2 ms alone."""
    layout = Layout((group(Role.BOTH, contention=Contention(prompt=(1.5, 1.5))),) * 2)
    found = served(layout, [100, 100], [1, 1], [0.0, 8.0])
    assert found.outcome.ttft_ms == pytest.approx([8.0 + 12.0 * 1.5, 12.0 * 1.5 + 8.0])


def test_other_machines_do_not_matter() -> None:
    layout = Layout((group(Role.BOTH, contention=SLOW), group(Role.BOTH, contention=SLOW, host=1)))
    assert served(layout, [100, 100], [3, 3], [0.0, 0.0]).outcome.e2e_ms == pytest.approx([32.0, 32.0])


def test_each_further_worker_costs_as_much() -> None:
    layout = Layout((group(Role.BOTH, contention=SLOW),) * 3)
    assert served(layout, [100] * 3, [1] * 3, [0.0] * 3).outcome.ttft_ms == pytest.approx([40.0] * 3)


def test_where_more_threads_compute_than_there_are_cores_they_take_turns() -> None:
    """Three workers of one core each, on two."""
    fast = Layout((group(Role.BOTH, cores=0.5),) * 3)
    assert served(fast, [100] * 2, [1] * 2, [0.0] * 2).outcome.ttft_ms == pytest.approx([20.0] * 2)
    assert served(fast, [100] * 3, [1] * 3, [0.0] * 3).outcome.ttft_ms == pytest.approx([30.0] * 3)
    slow = Layout((group(Role.BOTH, cores=0.5, contention=SLOW),) * 3)
    assert served(slow, [100] * 3, [1] * 3, [0.0] * 3).outcome.ttft_ms == pytest.approx([1.5 * 30.0] * 3)


def test_who_takes_no_cores_waits_for_none() -> None:
    """Nor does the simulator in C++, where steps that only decode are taken many at a time."""
    layout = Layout((group(Role.BOTH), group(Role.BOTH, cores=0.7), group(Role.BOTH, cores=0.7)))
    asked = [100] * 3, [20, 3, 3], [0.0, 0.0, 0.0]
    plain = served(layout, *asked).outcome.e2e_ms
    assert plain == pytest.approx([20.0 + 19 * 6.0, 1.4 * 32.0, 1.4 * 32.0])
    assert native.serve(layout, workload(asked[0], asked[1], asked[2]), 1.0).outcome.e2e_ms == pytest.approx(plain)


def test_workers_that_take_all_cores_halve_each_others_speed_and_are_never_beside_each_other() -> None:
    layout = Layout((group(Role.BOTH, cores=1.0, contention=SLOW),) * 2)
    assert served(layout, [100] * 2, [1] * 2, [0.0] * 2).outcome.ttft_ms == pytest.approx([40.0] * 2)


def test_what_the_other_computes_matters() -> None:
    """The first decodes in steps of 6 ms, beside 20 ms of a prompt, then beside decodes, then alone."""
    contention = Contention(decode=(1.5, 3.0))
    layout = Layout((group(Role.BOTH, contention=contention), group(Role.BOTH)))
    found = served(layout, [100, 100], [20, 3], [0.0, 20.0])
    # Of 19 steps, 114 ms: 20 / 1.5 ms in the first 20, 12 / 3 in the next 12, and the rest alone.
    assert found.outcome.e2e_ms == pytest.approx([20 + 20 + 12 + 114 - 20 / 1.5 - 12 / 3, 32.0])


def test_a_step_with_both_is_slowed_by_what_is_in_either() -> None:
    contention = Contention(prompt=(1.1, 1.2), decode=(1.3, 1.4))
    assert contention.more(prompts=1.0, others=1.0) == pytest.approx(0.1)
    assert contention.more(prompts=0.0, others=0.0) == pytest.approx(0.4)
    assert contention.more(prompts=0.75, others=0.5) == pytest.approx(0.75 * 0.15 + 0.25 * 0.35)


def test_nobody_is_faster_beside_others() -> None:
    with pytest.raises(ConfigError, match="1 or more times as long"):
        Layout((group(Role.BOTH, contention=Contention(prompt=(0.9, 1.0))),))
    with pytest.raises(ConfigError, match=r"cores is 1\.5"):
        Layout((group(Role.BOTH, cores=1.5),))


def test_contention_is_what_the_same_steps_take_longer() -> None:
    def points(prompt: float, decode: float) -> list[Point]:
        prompts = [Point.of([(0, n)], 0, 0, 1, n * prompt) for n in (50, 100, 200)]
        return prompts + [Point.of([], n, 100, 1, n * decode) for n in (1, 2, 4)]

    alone = points(1.0, 2.0)
    found = fit_contention(alone, points(1.2, 3.0), points(0.9, 2.2), 2)
    assert found.prompt == pytest.approx((1.1, 1.0))
    assert found.decode == pytest.approx((1.25, 1.05))
