"""`slipstream bench transfer`: how fast KV moves, on small caches."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from bench.cli import bench
from bench.transfer import rates
from bench.transfer.cli import speed_table
from bench.transfer.gloo_loop import gloo_loop_rate, memcpy_rate
from bench.transfer.lender import layout_of
from core.errors import ChecksumMismatch
from kv_transfer.messages import Piece

LAYOUT = layout_of(4, 2, 16, "bfloat16")  # 512 bytes per token


@pytest.fixture(scope="module")
def report() -> dict:
    return rates.measure_rates([1], 3, LAYOUT)


def test_every_transport_is_measured_beside_its_bare_primitive(report: dict) -> None:
    assert set(report["transports"]) == {"shared_memory", "tcp", "torch_distributed"}
    for found in report["transports"].values():
        one = found["1"]
        assert one["bytes"] == 1 << 20
        assert one["bytes_per_s"] == pytest.approx(one["bytes"] / (one["ms"] / 1e3))
        assert one["share_of_memcpy"] == pytest.approx(one["bytes_per_s"] / report["bare_bytes_per_s"]["memcpy"])
        assert one["hidden"] <= 1
        for name, rate in report["bare_same_size_bytes_per_s"]["1"].items():
            assert one[f"share_of_{name}"] == pytest.approx(one["bytes_per_s"] / rate)


def test_the_copy_is_measured_with_and_without_checksums(report: dict) -> None:
    assert report["copy"]["no_checksum"]["bytes_per_s"] > 0
    assert report["copy"]["checksum"]["bytes_per_s"] > 0


def test_a_checksum_that_is_wrong_fails_the_checked_copy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = rates.seal

    def wrongly(*arguments: Any) -> list[Piece]:
        return [replace(piece, checksum=piece.checksum ^ 1) for piece in sealed(*arguments)]

    monkeypatch.setattr(rates, "seal", wrongly)
    assert asyncio.run(rates._copy_rate(LAYOUT, 64, 1, checked=False)) > 0
    with pytest.raises(ChecksumMismatch, match="not what the giver sealed"):
        asyncio.run(rates._copy_rate(LAYOUT, 64, 1, checked=True))


def test_bare_loops_move_something() -> None:
    assert memcpy_rate(1 << 20, 2) > 0
    assert gloo_loop_rate(1 << 16, 3) > 0


def test_the_table_names_transports_sizes_and_the_gap(report: dict) -> None:
    gap = {"prompt_tokens": 512, "first_gap_extra_added_ms": 1.25, "ttft_added_ms": -0.5}
    text = speed_table(report | {"gap": gap})
    assert "shared_memory" in text
    assert "of memcpy" in text
    assert "+1.2 ms to the gap" in text
    assert "-0.5 ms to the time to it" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sizes", "8,x"], "--sizes: '8,x' is no list of MiB"),
        (["--sizes", "0"], "--sizes"),
        (["--sizes", "4096"], "up to 1024"),
        (["--codecs", "int8"], "--codecs has no meaning without --quality"),
        (["--quality", "--rounds", "5"], "--rounds has no meaning with --quality"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(flags: list[str], said: str) -> None:
    outcome = CliRunner().invoke(bench, ["transfer", *flags])
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
