"""The Pareto front, and how a plan is drawn."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from placement.pareto import Point, front, thinned
from placement.plan import Entry, Plan, Spread
from placement.plan_plot import svg
from placement.plan_table import table

_small = st.integers(1, 4).map(float)
points = st.lists(st.builds(Point, st.text(max_size=2), st.booleans(), st.integers(1, 4), _small, _small, _small))


def no_worse(one: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(one.losses, other.losses, strict=True))


@given(points)
def test_the_front_beats_all_that_is_left_out_and_nothing_of_it_beats_another(drawn: list[Point]) -> None:
    found = front(drawn)
    assert all(any(no_worse(kept, one) for kept in found) for one in drawn)
    assert not any(no_worse(a, b) for a in found for b in found if a is not b)
    assert [one.cost for one in found] == sorted(one.cost for one in found)


def test_prices_count_for_more_than_devices() -> None:
    dear = Point("dear", False, 1, 5.0, 10.0, 10.0, dollars_per_hour=9.0)
    cheap = Point("cheap", False, 4, 5.0, 10.0, 10.0, dollars_per_hour=2.0)
    assert front([dear, cheap]) == [cheap]


def test_a_long_front_is_shown_from_end_to_end() -> None:
    many = [Point(str(n), False, n, float(n), 1.0, 1.0) for n in range(1, 50)]
    shown = thinned(many, 8)
    assert (len(shown), shown[0], shown[-1]) == (8, many[0], many[-1])
    assert thinned(many[:3], 8) == many[:3]


PREDICTED = {
    f"{metric}_{at}": Spread(1e6, 1e6, 1e6) for metric in ("ttft", "tpot", "e2e") for at in ("p50", "p90", "p99")
} | {"attainment": Spread(0.9, 0.9, 0.9)}


def entry(name: str, goodput: float, *, apart: bool = False) -> Entry:
    return Entry(name, apart, 2, None, goodput, Spread(goodput, goodput - 1, goodput + 1), goodput, True)


def plan(tpot_ms: float) -> Plan:
    """Of two layouts, whose chosen one has this TPOT and the other three quarters of it."""
    ranking = [entry("2 x cpu <TP1>", 8.0), entry("1 prefill + 1 decode", 4.0, apart=True)]
    best, other = (8.0, 300.0, tpot_ms), (4.0, 200.0, 0.75 * tpot_ms)
    front_points = [Point("2 x cpu <TP1>", False, 2, *best), Point("other", True, 1, *other)]
    return Plan(
        model="m & m",
        topology="two cores",
        sources={},
        objective="per-device",
        ttft_ms=400,
        tpot_ms=60,
        share=0.9,
        rate_rps=8.0,
        chosen=ranking[0],
        why="",
        verdict="",
        predicted={},
        ranking=ranking,
        refused={},
        warnings=[],
        pareto=front_points,
    )


def test_a_plan_is_drawn_with_its_ranking_its_intervals_and_the_front() -> None:
    root = Xml.fromstring(svg(plan(40.0)))
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [element.text for element in root.findall("svg:text", names)]
    assert {"2 x cpu <TP1>", "1 prefill + 1 decode", "8", "4", "m & m on two cores"} <= set(texts)
    widths = [float(bar.get("width", "")) for bar in root.findall("svg:rect", names) if bar.get("height") == "16"]
    assert widths[0] == 2 * widths[1]
    circles = root.findall("svg:circle", names)
    assert len(circles) == 4
    assert circles[0].get("fill") == circles[2].get("fill") != circles[1].get("fill"), "the chosen one stands out"


def test_columns_of_a_table_stay_apart_whatever_stands_in_them() -> None:
    dear = Point("dear", False, 1024, 28_461.0, 300.0, 40.0, dollars_per_hour=123_456.7)
    large = replace(
        plan(40.0),
        ranking=[entry("2 x cpu", 2846.0), entry("1 x cpu", 1.25)],
        predicted=PREDICTED,
        pareto=[dear],
    )
    lines = [" ".join(line.split()) for line in table(large).splitlines()]
    assert "2846 2845 to 2847 yes 2 2 x cpu" in lines
    assert "1.25 0.25 to 2.25 yes 2 1 x cpu" in lines
    assert "28461 300 40 1024 devices, $1.235e+05 an hour dear" in lines
    assert "ttft 1000000 (1000000 to 1000000) 1000000 (1000000 to 1000000) 1000000 (1000000 to 1000000)" in lines


def test_reasons_stand_once_each_and_the_table_has_no_more_than_a_few() -> None:
    refused = {f"TP{n}": "no room" for n in range(5)} | {f"PP{n}": f"{n} stages" for n in range(500)}
    lines = table(replace(plan(40.0), predicted=PREDICTED, refused=refused)).splitlines()
    told = [line for line in lines if line.startswith("infeasible: ")]
    assert told[:2] == ["infeasible: TP0, and 4 more alike: no room", "infeasible: PP0: 0 stages"]
    assert told[-1] == "infeasible: 489 more, for other reasons"
    assert len(told) == 13


def test_a_plan_is_drawn_where_every_request_gets_one_token() -> None:
    circles = list(Xml.fromstring(svg(plan(0.0))).iter("{http://www.w3.org/2000/svg}circle"))
    assert len({circle.get("cy") for circle in circles[2:]}) == 1
