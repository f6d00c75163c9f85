"""Fitting the latency model to measured steps, and the profile that is stored."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from core.errors import ConfigError
from placement.fit import Point, distserve_ms, fit, fit_distserve
from placement.grid import FULL, QUICK, Grid
from placement.latency import Coefficients, DistServeLatency, Speculation, StepLatency
from placement.layout import Role
from placement.profile import read_profile, write_profile
from placement.workload import Workload
from tests.placement.layouts import STEP, group
from tests.placement.profiles import DECODES, PROMPTS, disturbed, points, profile

_term = st.floats(0.01, 10.0)
_latencies = st.builds(
    lambda prompt, small, jump, rows, shared: StepLatency(
        Coefficients(*prompt), Coefficients(*small), Coefficients(small[0] + jump, small[1], small[2]), rows, shared
    ),
    st.tuples(_term, _term, st.floats(0.0, 1e-3)),
    st.tuples(_term, st.floats(1e-5, 0.1), _term),
    st.floats(1.0, 20.0),
    st.sampled_from([8, 12, 16]),
    st.floats(0.0, 0.01),
)


@given(_latencies)
def test_steps_that_follow_the_model_are_fitted_without_an_error(latency: StepLatency) -> None:
    found = fit(points(latency))
    assert max(abs(point.error(found)) for point in points(latency)) < 1e-6
    assert found.shared_ms == pytest.approx(latency.shared_ms, abs=1e-4)


def test_the_border_between_small_and_large_batches_is_found() -> None:
    found = fit(points(STEP))  # its border is at 6 rows
    assert 4 < found.large_rows <= 8
    assert found.decode == pytest.approx(STEP.decode)
    assert found.large_decode == pytest.approx(STEP.large_decode)


@pytest.mark.parametrize("grid", [QUICK, FULL])
@pytest.mark.parametrize("seed", range(10))
def test_batches_between_those_that_a_grid_measures_are_foretold_too(grid: Grid, seed: int) -> None:
    """A decode reads all weights, or computes more rows than that takes (Williams et al., 2009): on a CPU from about 13
    on. Measured to 4 %."""
    rng = np.random.default_rng(seed)
    prompts = [point for point in points(STEP) if not point.sequences]

    def decode(batch: int, context: int, off: float = 0.0) -> Point:
        ms = max(10.3 + 0.12 * batch, 0.9 * batch) + 0.0015 * batch * context
        return Point.of((), batch, context, 1, ms * (1 + off))

    measured = [decode(*one, rng.uniform(-0.04, 0.04)) for one in itertools.product(grid.batches, grid.contexts)]
    found = fit([*prompts, *measured])
    assert max(abs(decode(batch, 200).error(found)) for batch in range(1, 33)) < 0.12


MEASURED = [
    (16, 256, 0, 0, 0, 13.6),
    (64, 4096, 0, 0, 0, 38.0),
    (128, 16384, 0, 0, 0, 72.6),
    (256, 65536, 0, 0, 0, 150.6),
    (512, 262144, 0, 0, 0, 325.4),
    (64, 36864, 0, 0, 0, 44.5),
    (256, 196608, 0, 0, 0, 167.3),
    (256, 16384, 0, 0, 0, 149.9),
    (512, 65536, 0, 0, 0, 294.9),
    (0, 0, 64, 1, 1, 11.3),
    (0, 0, 512, 1, 1, 11.3),
    (0, 0, 256, 4, 4, 12.4),
    (0, 0, 2048, 4, 4, 15.4),
    (0, 0, 1024, 16, 16, 16.8),
    (0, 0, 8192, 16, 16, 27.8),
    (0, 0, 2048, 32, 32, 31.2),
    (0, 0, 16384, 32, 32, 53.0),
    (0, 0, 512, 1, 4, 13.1),
    (0, 0, 8192, 16, 64, 80.4),
    (64, 4096, 2048, 4, 4, 43.3),
    (256, 65536, 2048, 4, 4, 155.7),
    (64, 4096, 16384, 32, 32, 89.8),
    (256, 65536, 16384, 32, 32, 224.3),
]
"""Of the demo model on one core: tokens, squares, context, sequences, rows, ms."""


def test_steps_of_a_real_machine_are_fitted_small_ones_and_large_ones_alone_and_together() -> None:
    """A token of a large step takes longer than one of a small step, and few decodes cost a prompt's step hardly more
    than their rows: by one line for all prompts and one saving for all steps with both, prompts of 64 tokens would be
    4 % too long, and beside 4 decodes 16 %."""
    steps = [Point(*counts, longest=1, ms=ms) for *counts, ms in MEASURED]
    found = fit(steps)
    for step in steps:
        if step.tokens:
            most = 0.02 if not step.sequences else 0.04 if step.rows < 32 else 0.08
            assert abs(step.error(found)) < most, step
    assert 4 < found.shared_rows <= 32


def test_no_coefficient_is_negative_even_where_steps_shrink_with_what_is_in_them() -> None:
    shrinking = [Point.of(((0, tokens),), 0, 0, 1, 100.0 / tokens) for tokens in (16, 64, 256)]
    found = fit([*shrinking, *(Point.of((), batch, context, 1, 50.0 / batch) for batch, context in DECODES)])
    for coefficients in (found.prompt, found.large_prompt, found.decode, found.large_decode):
        assert coefficients is not None
        assert min(coefficients) >= 0
    assert found.step_ms(64, 64**2, 0, 0, 0) > 0


def test_errors_are_relative_so_that_short_steps_count_as_much_as_long_ones() -> None:
    ten_percent_off = [Point.of(((0, n),), 0, 0, 1, n * (1.1 if n % 3 else 0.9)) for n in (30, 100, 3000, 10000)]
    found = fit([*ten_percent_off, *points(STEP)[len(PROMPTS) :]])
    assert all(abs(point.error(found)) < 0.15 for point in ten_percent_off)


def test_the_form_of_distserve_is_fitted_to_the_steps_that_it_knows() -> None:
    small, large = Coefficients(4.0, 1e-3, 0.2), Coefficients(9.0, 1e-3, 0.1)
    known = DistServeLatency(Coefficients(5.0, 0.05, 1e-6), small, large)
    batches = [Point.of((), batch, context, 1, 1.0) for batch in (4, 16, 64, 95, 128, 256) for context in (64, 512)]
    steps = [*(Point.of(prompts, 0, 0, 1, 1.0) for prompts in PROMPTS), *batches]
    found = fit_distserve([replace(step, ms=distserve_ms(known, step)) for step in steps])
    assert found.prefill == pytest.approx(known.prefill)
    assert found.decode == pytest.approx(known.decode)
    assert found.large_decode == pytest.approx(known.large_decode)
    mixed = Point.of(((0, 64),), 4, 256, 1, 500.0)
    assert fit_distserve([*points(STEP), mixed]) == fit_distserve(points(STEP))


def test_too_few_steps_are_refused_by_their_kind() -> None:
    with pytest.raises(ConfigError, match="3 steps with only decodes, and there are 2"):
        fit([*points(STEP)[: len(PROMPTS) + 2]])


# --- the stored object -----------------------------------------------------------------------------------------------


def test_a_stored_profile_comes_back_equal(tmp_path: Path) -> None:
    write_profile(profile(), tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format": 1', '"format": 9'), "format is 9, not 1"),
        (lambda text: text.replace('"weight_bytes"', '"weights"'), "weights"),
        (lambda text: text.replace('"kv_token_bytes": 100000', '"kv_token_bytes": 0'), ">= 1 - at .*kv_token_bytes"),
        (lambda text: text.replace('"tokens": 16,', '"tokens": 4000000000000000000,'), r"points\[\d+\]\.tokens"),
        (lambda text: text[:100], "truncated"),
        (lambda text: text.replace('"sequences": 1,', '"sequences": "one",'), r"points\[7\]\.sequences"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=rf"profile\.json is no profile.*{message}"):
        read_profile(path)


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_profile(tmp_path / "none.json")


def requests(prompt: int, output: int) -> Workload:
    return Workload(np.array([prompt, prompt]), np.array([output, output]), np.ones(2))


def test_within_what_was_measured_there_is_nothing_to_say() -> None:
    measured = group(Role.BOTH, chunk_tokens=1024, max_sequences=32)
    assert profile().beyond(measured, requests(600, 100)) == []


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({"max_sequences": 64}, (600, 100), "64 sequences that decode, and no more than 32 were measured"),
        ({"chunk_tokens": 2048}, (1600, 100), "2048 tokens of prompts, and no more than 1024"),
        ({}, (1000, 100), "sequences of 1100 tokens, and none longer than 1025"),
        ({"speculation": Speculation(2.0, 4)}, (600, 100), "128 rows that decode, and no more than 32"),
    ],
)
def test_what_was_never_measured_is_named_with_the_range(changes, asked, said: str) -> None:
    beyond = group(Role.BOTH, **({"chunk_tokens": 1024, "max_sequences": 32} | changes))
    assert any(said in sentence for sentence in profile().beyond(beyond, requests(*asked)))


def test_of_requests_that_are_not_known_no_length_is_said_to_be_beyond() -> None:
    large = group(Role.BOTH, chunk_tokens=2048, max_sequences=32)
    assert profile().beyond(large, None) == ["steps with 2048 tokens of prompts, and no more than 1024 were measured"]


def test_a_role_is_not_blamed_for_steps_that_it_never_runs() -> None:
    large = {"chunk_tokens": 4096, "max_sequences": 500}
    assert profile().beyond(group(Role.PREFILL, **large | {"chunk_tokens": 1024}), requests(600, 100)) == []
    assert profile().beyond(group(Role.DECODE, **large | {"max_sequences": 32}), requests(600, 100)) == []


def test_the_table_has_a_line_for_each_point_and_the_errors() -> None:
    lines = profile().table().splitlines()
    assert len(lines) == 1 + len(profile().points) + 2
    assert lines[-2] == f"error of the fit: median 0.0%, worst 0.0% of {len(profile().points)} steps"
    assert lines[-1].startswith("error of DistServe's form: median ")


def test_a_profile_that_the_model_does_not_fit_is_doubted_by_its_worst_step() -> None:
    assert profile().doubt() is None
    one_odd = [*points(STEP)[:-1], replace(points(STEP)[-1], ms=100.0)]
    assert profile(points=tuple(one_odd)).doubt() is None  # what the median leaves out, the fit does too
    said = disturbed().doubt()
    assert said is not None
    assert "1 cpu a stage is off by " in said
    assert "for a step of 256 tokens of prompts and 16 sequences that decode 16 rows which took " in said
    assert disturbed(source="roofline").doubt() is None
