"""`slipstream bench transfer`: how fast KV moves, on small caches."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from bench.cli import bench
from bench.hosts import namespaces, relay, shaped
from bench.transfer import gap, rates, wire
from bench.transfer.cli import link_table, speed_table
from bench.transfer.gloo_loop import gloo_loop_rate, memcpy_rate
from bench.transfer.lender import layout_of
from bench.transfer.links import Link
from bench.transfer.over_link import measure_links
from bench.transfer.sides import two_sides
from core.errors import ChecksumMismatch
from kv_transfer.messages import Piece
from kv_transfer.transports.names import TransportName

LAYOUT = layout_of(4, 2, 16, "bfloat16")  # 512 bytes per token


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return rates.measure_rates([1], 3, LAYOUT)


def test_every_transport_is_measured_beside_its_bare_primitive(report: dict[str, Any]) -> None:
    assert set(report["transports"]) == {"shared_memory", "tcp", "torch_distributed"}
    for found in report["transports"].values():
        one = found["1"]
        assert one["bytes"] == 1 << 20
        assert one["hidden"] <= 1
        for found_rates in (one, one["alone"]["checksum"], one["alone"]["no_checksum"]):
            assert found_rates["bytes_per_s"] == pytest.approx(one["bytes"] / (found_rates["ms"] / 1e3))
            assert found_rates["share"] == pytest.approx(found_rates["bytes_per_s"] / one["bare_bytes_per_s"]["cached"])
            assert found_rates["share_same_size"] == pytest.approx(
                found_rates["bytes_per_s"] / one["bare_bytes_per_s"]["same_size"]
            )
    tcp = report["transports"]["tcp"]["1"]
    assert tcp["share_paced"] == pytest.approx(tcp["bytes_per_s"] / tcp["bare_bytes_per_s"]["paced"])


@pytest.mark.parametrize("transport", ["shared_memory", "tcp", "torch_distributed"])
def test_a_checksum_that_is_wrong_fails_the_checked_pull_only(
    transport: TransportName, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = wire._offered

    async def wrongly(heard: Any) -> tuple[list[int], list[Piece]]:
        block_ids, pieces = await offered(heard)
        return block_ids, [replace(piece, checksum=piece.checksum ^ 1) for piece in pieces]

    monkeypatch.setattr(wire, "_offered", wrongly)
    with two_sides(LAYOUT, 64) as (lender, pool):
        with pytest.raises(ChecksumMismatch, match="not what the giver sealed"):
            asyncio.run(wire.measure_wire(lender, pool, transport, 64, 1))
        unchecked = {"no_checksum": wire.KINDS["no_checksum"]}
        assert asyncio.run(wire.measure_wire(lender, pool, transport, 48, 1, unchecked))["no_checksum"] > 0


def test_bare_loops_move_something() -> None:
    assert memcpy_rate(1 << 20, 2) > 0
    assert gloo_loop_rate(1 << 16, 3) > 0


def test_the_table_names_transports_sizes_and_the_gap(report: dict[str, Any]) -> None:
    seen: dict[str, Any] = {"prompt_tokens": 512}
    seen |= {"first_gap_extra_added_ms": 1.25, "first_gap_extra_added_by_start_ms": [2.0, 1.25, 0.5]}
    seen |= {"ttft_added_ms": -0.5, "ttft_added_by_start_ms": [-2.0, -0.5, 1.0]}
    text = speed_table(report | {"gap": seen})
    assert "shared_memory" in text
    assert "unsummed" in text
    assert "+1.2 ms (+0.5 to +2.0) to the gap" in text
    assert "-0.5 ms (-2.0 to +1.0) to the time to it" in text


def test_what_a_hand_off_adds_is_told_for_each_start_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = itertools.cycle([20.0, 40.0])  # one start of two is on slow memory

    async def ask(*_: Any) -> list[tuple[gap.Seen, gap.Seen]]:
        extra = next(slow)
        return [(gap.Seen(300 + extra + i, 3), gap.Seen(300 + i, 1)) for i in (0, 50, 7)]

    @contextmanager
    def running(*_: Any) -> Iterator[tuple[str, None, float]]:
        yield "http://a", None, 0.0

    monkeypatch.setattr(gap, "running", running)
    monkeypatch.setattr(gap, "_ask_by_turns", ask)
    found = gap.measure_gap("demo", 512, 3, 2)
    assert found["ttft_added_by_start_ms"] == [20, 40]
    assert found["ttft_added_ms"] == 30
    assert found["first_gap_extra_added_ms"] == 2
    assert found["colocated"] == {"ttft_ms": 307, "first_gap_extra_ms": 1}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sizes", "8,x"], "--sizes: '8,x' is no list of MiB"),
        (["--sizes", "0"], "--sizes"),
        (["--sizes", "4096"], "up to 1024"),
        (["--codecs", "int8"], "--codecs has no meaning without --quality"),
        (["--quality", "--rounds", "5"], "--rounds has no meaning with --quality"),
        (["--sizes", "11.255"], "--sizes"),
        (["--link", "fast"], "--link: 'fast' is no rate from 10mbit to 100gbit"),
        (["--link", "1gbit,9mbit"], "--link: '9mbit' is no rate"),
        (["--delay-ms", "1"], "--delay-ms has no meaning without --link"),
        (["--link", "1gbit", "--servers", "1"], "--servers has no meaning with --link"),
        (["--link", "1gbit", "--quality"], "--link has no meaning with --quality"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(flags: list[str], said: str) -> None:
    outcome = CliRunner().invoke(bench, ["transfer", *flags])
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_where_no_two_hosts_can_be_made_a_link_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "missing", lambda: "needs root on Linux")
    for flags in (["--link", "1gbit"], ["--link", "1gbit", "--delay-ms", "1"]):
        outcome = CliRunner().invoke(bench, ["transfer", *flags])
        assert outcome.exit_code == 2
        assert "two hosts can't be made on this machine: needs root on Linux" in outcome.stderr


@pytest.mark.skipif(bool(shaped.missing()), reason=f"two hosts on one machine: {shaped.missing()}")
def test_over_a_link_of_the_kernel_everything_is_held_to_its_rate() -> None:
    check_links(*over_links({"200mbit": Link(200e6, 0.0)}), 200e6)


@pytest.mark.skipif(bool(relay.missing()), reason=f"two hosts on one machine: {relay.missing()}")
def test_over_a_link_with_a_delay_asking_one_by_one_costs_the_way_there_and_back() -> None:
    found, text = over_links({"200mbit": Link(200e6, 0.02)})
    check_links(found, text, 200e6)
    for transport in found["links"]["200mbit"]["transports"].values():
        assert transport["1"]["one_at_a_time"]["ms"] > 40 + 1e3 * transport["1"]["bytes"] * 8 / 200e6


def over_links(links: dict[str, Link]) -> tuple[dict[str, Any], str]:
    found = measure_links(links, [1], 9, LAYOUT)  # a link that waited for its sender lets some go at once: medians
    return found, link_table(found)


def check_links(found: dict[str, Any], text: str, bits_per_s: float) -> None:
    """Of one link."""
    ((name, link),) = found["links"].items()
    assert set(link["transports"]) == {"tcp", "torch_distributed"}
    for transport, by_size in link["transports"].items():
        one = by_size["1"]
        assert f"{transport:<18}{'1':>6}" in text
        assert name in text
        assert 0.3 * bits_per_s < 8 * one["bare_bytes_per_s"] < 1.1 * bits_per_s
        for how in ("in_flight", "one_at_a_time"):
            assert 8 * one[how]["bytes_per_s"] < 1.2 * bits_per_s
            assert one[how]["share"] == pytest.approx(one[how]["bytes_per_s"] / one["bare_bytes_per_s"])
