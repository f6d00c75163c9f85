"""The kernel for few rows in float32 computes what F.linear does, for every shape that its tiles are cut from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.compiler import why_no_compiler
from engine.linear import MOST_FEW, FewRowsLinear, PlainLinear, make_linear
from engine.native import few_rows
from engine.runner import ModelRunner
from tests.tiny import save_tiny_llama

RUNS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_kernel = pytest.mark.skipif(not RUNS or why_no_compiler() is not None, reason="needs AVX2 and a C++ compiler")


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process where nobody has loaded it. What suits AVX2 runs with AVX-512 as well."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    few_rows.load.cache_clear()
    yield
    few_rows.load.cache_clear()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (2, 7), (3, 8), (4, 9), (50, 31), (96, 64), (7, 576)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_number_of_rows_gives_what_torch_does(threads: int, outputs: int, inputs: int, bias: bool) -> None:
    few_rows.load()
    weight, b = random(outputs, inputs, seed=1), random(outputs, seed=2) if bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in range(MOST_FEW + 2):
            x, residual = random(rows, inputs, seed=rows), random(rows, outputs, seed=rows + 1)
            kept = x.clone(), residual.clone()
            layer, plain = FewRowsLinear(weight, b), PlainLinear(weight, b)
            for found, expected in ((layer(x), plain(x)), (layer.add(x, residual), plain.add(x, residual))):
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
                assert found.is_contiguous(), "views are taken of it"
            assert torch.equal(x, kept[0])
            assert torch.equal(residual, kept[1])
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_nothing_beside_its_tensors_is_read_or_written() -> None:
    few_rows.load()
    outputs, inputs, rows = 5, 13, 3
    weights, xs = torch.full((outputs + 2, inputs), torch.nan), torch.full((rows + 2, inputs + 4), torch.nan)
    weights[1:-1], xs[1:-1, 2:-2] = random(outputs, inputs, seed=0), random(rows, inputs, seed=1)
    found = few_rows.product(xs[1:-1, 2:-2], weights[1:-1], None)
    torch.testing.assert_close(found, F.linear(xs[1:-1, 2:-2], weights[1:-1]))


@needs_kernel
def test_columns_of_a_transposed_tensor_are_copied_first() -> None:
    few_rows.load()
    weight, x = random(4, 6, seed=0), random(6, 3, seed=1).t()
    torch.testing.assert_close(few_rows.product(x, weight, None), F.linear(x, weight))


@needs_kernel
@pytest.mark.parametrize(
    ("x", "weight", "bias", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, "don't fit"),
        (torch.zeros(3), torch.zeros(4, 3), None, "don't fit"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), "don't fit"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3), None, "float32"),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64), None, "float32"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.float64), "float32"),
        (torch.zeros(2, 3), torch.zeros(3, 4).t(), None, "contiguous"),
    ],
)
def test_what_it_cannot_read_is_refused(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, said: str
) -> None:
    few_rows.load()
    with pytest.raises(ValueError, match=said):
        few_rows.product(x, weight, bias)


@needs_kernel
def test_layers_use_it_once_it_is_loaded() -> None:
    assert type(make_linear(torch.zeros(8, 4))) is PlainLinear, "nobody has asked for it"
    few_rows.load()
    assert type(make_linear(torch.zeros(8, 4))) is FewRowsLinear
    assert type(make_linear(torch.zeros(8, 4, dtype=torch.float16))) is PlainLinear


@needs_kernel
@pytest.mark.parametrize("eager", [False, True])
def test_a_worker_in_float32_loads_it_unless_it_is_to_be_eager(tmp_path: Path, eager: bool) -> None:
    save_tiny_llama(tmp_path)
    ModelRunner.load(tmp_path, dtype="float32", device="cpu", num_blocks=4, enforce_eager=eager)
    assert few_rows.is_loaded() is not eager


def test_without_a_compiler_it_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    assert few_rows.load() is None
    assert "no-such-compiler" in caplog.text
    assert not few_rows.is_loaded()


def test_where_it_was_not_measured_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert few_rows.load() is None


@needs_kernel
def test_a_profile_shows_it() -> None:
    few_rows.load()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        few_rows.product(torch.zeros(2, 3), torch.zeros(4, 3), None)
    assert any("few_rows_linear" in event.key for event in profile.key_averages())
