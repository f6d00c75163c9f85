"""What an operator sees of replanning."""

from __future__ import annotations

from scripted import MakeGateway

from core.replan_metrics import Decided, ReplanStatus

DECIDED = Decided(
    at_s=1000.0,
    by="reactive",
    to="1 prefill + 2 decode, steps of 512 tokens",
    why="tokens are slow",
    before=0.5,
    after=0.9,
    gain=40.0,
    cost=2.0,
    carried_out=True,
)
STATUS = ReplanStatus(
    mode="on",
    plan_id=3,
    wanted={"prefill": 1, "decode": 2},
    arrangement="1 prefill + 2 decode, steps of 512 tokens",
    targets={"ttft_ms": 1000.0, "tpot_ms": 40.0, "share": 0.9},
    decided={"reactive": 1, "predictive": 2},
    attainment=0.75,
    goodput_rps=1.5,
    correction={"prompts": 1.25, "decodes": 1.0},
    acceptance_length=2.5,
    decisions=[DECIDED],
)


async def test_while_nobody_replans_the_page_says_so_and_there_are_no_series(gateway: MakeGateway) -> None:
    server = gateway()
    assert (await server.client.get("/replanning")).json() == {"mode": "off"}
    assert "slipstream:plan_id" not in (await server.client.get("/metrics")).text


async def test_the_plan_and_what_was_decided_lately_are_shown(gateway: MakeGateway) -> None:
    server = gateway()
    server.backend.replanning = STATUS
    shown = (await server.client.get("/replanning")).json()
    assert (shown["plan_id"], shown["wanted"]) == (3, {"prefill": 1, "decode": 2})
    assert shown["targets"] == {"ttft_ms": 1000.0, "tpot_ms": 40.0, "share": 0.9}
    assert shown["decisions"][0]["why"] == "tokens are slow"
    assert (shown["correction"], shown["acceptance_length"]) == ({"prompts": 1.25, "decodes": 1.0}, 2.5)


async def test_the_series_say_what_is_planned_and_what_is_reached(gateway: MakeGateway) -> None:
    server = gateway()
    server.backend.replanning = STATUS
    assert server.sample("slipstream:plan_id", replica="0") == 3
    assert server.sample("slipstream:planned_workers", replica="0", planned_role="decode") == 2
    assert server.sample("slipstream:replans_total", replica="0", by="predictive", mode="on") == 2
    assert server.sample("slipstream:slo_attainment", replica="0") == 0.75
    assert server.sample("slipstream:goodput_rps", replica="0") == 1.5
    assert server.sample("slipstream:profile_correction", replica="0", work="prompts") == 1.25
