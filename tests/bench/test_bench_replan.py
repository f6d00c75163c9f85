"""`slipstream bench replan`: the load, what is made of its answers, and one short run of all of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from bench.cli import bench
from bench.replanning import session
from bench.replanning.measure import Answer, Run, measure
from bench.replanning.plot import svg
from bench.replanning.report import Report, table, verdict_of
from bench.replanning.session import Asked
from bench.replanning.shift import Phase, Shift, best_split, kinds, most_rate, rates_that_matter
from cluster.replan_setup import replanner_of
from core.errors import ConfigError
from core.replan_metrics import Decided
from core.served import Served
from core.types import FinishReason
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.latency import Coefficients, StepLatency
from placement.layout import Role
from placement.lengths import parse_lengths
from placement.outcome import Targets
from placement.profile import Setting, read_profile, write_profile
from placement.replanner import Replanner
from placement.worker_shape import WorkerShape
from placement.workload import Workload
from tests.cluster.test_live_changes import config
from tests.cluster.test_shapes_change import ONE, Said
from tests.placement.layouts import group
from tests.placement.profiles import profile
from tests.tiny import save_byte_tokenizer, save_tiny_llama

TARGETS = Targets(1000.0, 12.0)
PREDICTOR = Simulated(group=group(Role.BOTH), targets=TARGETS, most_tokens=4096)
PROMPTS, OUTPUTS = parse_lengths("prompt=400,output=4"), parse_lengths("prompt=10,output=60")


def answer(due_s: float, *, ttft_ms: float = 100.0, tpot_ms: float | None = 10.0, whole: bool = True) -> Answer:
    return Answer(due_s, Served(1000.0 + due_s, 10, 0, 5, ttft_ms, tpot_ms, FinishReason.LENGTH), whole)


def even(count: int) -> Workload:
    return Workload(np.full(count, 10, np.int32), np.full(count, 5, np.int32), np.ones(count))


def run(answers: Sequence[Answer], *, replanned: bool = True, done_s: float | None = 49.5) -> Run:
    made = Decided(
        at_s=45.0, by="reactive", to="1 prefill + 2 decode, steps of 512 tokens", why="slow", before=0.2, after=0.9,
        gain=30.0, cost=2.0, carried_out=True,
    )  # fmt: skip
    return Run(replanned, list(answers), [made] if replanned else [], [done_s] if replanned else [])


def test_each_kind_of_request_comes_in_its_time_and_at_its_rate() -> None:
    shift = Shift(Phase(even(100), 2.0, 10.0), Phase(even(100), 5.0, 4.0))
    due = [at for at, _, _ in shift.requests()]
    assert sum(at < 10 for at in due) == 19
    assert sum(at >= 10 for at in due) == 19
    assert due == sorted(due)
    assert max(due) < shift.seconds == 14.0


def test_cached_prompts_are_refused_as_no_cache_could_have_them() -> None:
    with pytest.raises(ConfigError, match="--after: prompts are random tokens here"):
        kinds("prompt=400,output=4", "prompt=10,output=60,cached=0.5", 0)


def test_workers_begin_as_the_split_that_is_best_for_what_comes_first() -> None:
    assert best_split(PREDICTOR, PROMPTS, 3, 2048, 0.9) == Arrangement(2, 1, 0, 2048)
    assert best_split(PREDICTOR, OUTPUTS, 3, 2048, 0.9) == Arrangement(1, 2, 0, 2048)


def test_after_the_shift_comes_more_than_they_stand_and_less_than_others_would() -> None:
    now, best = Arrangement(2, 1, 0, 2048), Arrangement(1, 2, 0, 2048)
    works = PROMPTS, OUTPUTS
    before, after = rates_that_matter(lambda to, phase: most_rate(PREDICTOR, to, works[phase], 0.9), now, [best])
    assert PREDICTOR.attainment(now, PROMPTS, before) > 0.9
    assert PREDICTOR.attainment(now, OUTPUTS, after) < 0.9
    assert PREDICTOR.attainment(best, OUTPUTS, after) > 0.9


def test_a_shift_that_changes_nothing_is_refused_with_the_rates() -> None:
    now = Arrangement(2, 1, 0, 2048)
    with pytest.raises(ConfigError, match=r"stands 3 requests/s before the shift and 3 after it.*nothing is to be"):
        rates_that_matter(lambda _, __: 3.0, now, [Arrangement(1, 2, 0, 2048)])


def test_it_has_recovered_when_the_last_window_that_missed_the_goal_is_over() -> None:
    answers = [answer(at / 2, tpot_ms=50.0 if 40 <= at / 2 < 52 else 10.0) for at in range(240)]
    verdict = verdict_of(run(answers), TARGETS, 0.9, 40.0, 120.0)
    assert verdict.before == 1.0
    assert verdict.after == pytest.approx(136 / 160)
    assert verdict.recovered_s == 20.0  # the window that ends there begins at 50, and 4 of its 20 requests missed
    assert verdict.lost == 0


@pytest.mark.parametrize(
    ("slow_until", "recovered_s"),
    [(40.0, 0.0), (120.0, None)],
    ids=["nothing was missed", "it went on to the end"],
)
def test_the_two_ends_of_recovery(slow_until: float, recovered_s: float | None) -> None:
    answers = [answer(float(at), ttft_ms=5000.0 if 40 <= at < slow_until else 10.0) for at in range(120)]
    assert verdict_of(run(answers), TARGETS, 0.9, 40.0, 120.0).recovered_s == recovered_s


def test_a_request_that_was_not_answered_whole_is_lost_and_met_nothing() -> None:
    verdict = verdict_of(run([answer(1.0), answer(2.0, whole=False)]), TARGETS, 0.9, 0.0, 10.0)
    assert (verdict.lost, verdict.after) == (1, 0.5)


@pytest.mark.parametrize(("done_s", "during"), [(49.5, 0.5), (None, 0.25)])
def test_those_that_came_while_workers_changed_are_counted_apart(done_s: float | None, during: float) -> None:
    answers = [answer(at, tpot_ms=50.0 if at > 47 else 10.0) for at in (44.0, 46.0, 48.0, 60.0, 70.0)]
    assert verdict_of(run(answers, done_s=done_s), TARGETS, 0.9, 40.0, 120.0).during == during


def report() -> Report:
    answers = [answer(at / 2) for at in range(240)]
    runs = [run(answers, replanned=False), run(answers)]
    return Report(
        model="demo",
        targets=TARGETS,
        share=0.9,
        shift_s=40.0,
        workers=3,
        began_as="2 prefill + 1 decode, steps of 512 tokens",
        rates=(2.0, 5.0),
        verdicts=[verdict_of(one, TARGETS, 0.9, 40.0, 120.0) for one in runs],
        runs=runs,
    )


def test_the_table_has_a_row_for_every_ten_seconds_and_says_what_was_changed() -> None:
    text = table(report())
    assert sum(line.split()[1:] == ["100%", "100%"] for line in text.splitlines()) == 12
    assert "45.0 s  reactive: 1 prefill + 2 decode, steps of 512 tokens, done after 4.5 s; slow" in text
    assert "100% of those that came while workers changed" in text
    assert "0 of 240 requests lost" in text


def test_the_picture_has_a_line_for_each_run_and_marks_the_shift_and_the_change() -> None:
    drawn = Xml.fromstring(svg(report()))
    lines = [found for found in drawn.iter() if found.tag.endswith("polyline")]
    texts = [found.text or "" for found in drawn.iter() if found.tag.endswith("text")]
    assert len(lines) == 2
    assert "shift, 40 s" in texts
    assert "1 prefill + 2 decode" in texts


def test_workers_begin_with_the_first_shape_and_may_change_to_the_others(tmp_path: Path) -> None:
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, tp in zip(paths, (1, 2), strict=True):
        write_profile(profile(setting=Setting(device="cpu", tp=tp)), path)
    asked = Asked(
        model="small", profile=paths[0], slo="ttft=900,tpot=30", share=0.9, workers=2, max_workers=3, shapes="1x1,2x1",
        further=paths[1:], before="prompt=100,output=4", after="prompt=10,output=20", rates=(1.0, 1.0), before_s=1.0,
        after_s=1.0, interval=1.0, forecast="constant", repeats=1, seed=0,
    )  # fmt: skip
    measured = read_profile(paths[0])
    now, grounds, _ = session._shift(asked, measured)
    assert (now.of_shapes, now.workers) == ({WorkerShape(1, 1): 2}, 2)
    replanner = replanner_of(session._config(asked, measured, now), grounds)
    assert (replanner.arrangement.counts, replanner.settings.devices) == (now.counts, 3)
    reachable = {(*other.of_shapes.items(),) for other in session._others(replanner.settings, now, replanner.predictor)}
    assert ((WorkerShape(2, 1), 1),) in reachable
    assert ((WorkerShape(1, 1), 3),) in reachable


@pytest.mark.asyncio
async def test_a_run_says_when_the_workers_were_as_decided(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    three, two = (Arrangement(0, 0, count, 256, ONE, ONE) for count in (3, 2))
    given = {"replan": "on", "replan_slo": "ttft=1,tpot=1", "replan_profile": "unread.json", "replan_shapes": "1x1,2x1"}
    said = Said(three, 3)
    asyncio.get_running_loop().call_later(1.0, said.say, two)
    found = await measure(
        config(**given, colocated=True, decode_replicas=3),
        tmp_path,
        [(at / 10, 20, 8) for at in range(40)],
        (cast("Replanner", said), "on"),
        threads=1,
        vocabulary=128,
        seed=0,
    )
    assert all(one.whole for one in found.answers)
    assert [change.to for change in found.changes] == [str(two)]
    assert found.done[0] is not None
    assert found.changes[0].at_s < found.done[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rates", "2"], "--rates: '2' is not a rate before and one after"),
        (["--rates", "0,2"], "both are above 0"),
        (["--slo", "ttft=5"], "has no tpot"),
        (["--profile", "nowhere.json"], "nowhere.json can't be read"),
        ([], "has model small, and the workers have another"),
    ],
)
def test_bad_flags_are_refused_by_name(flags: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(), path)
    given = ["replan", "another", "--profile", str(path), "--slo", "ttft=900,tpot=30", *flags]
    found = CliRunner().invoke(bench, given)
    assert found.exit_code == 2
    assert message in found.output


def test_a_short_run_loses_nothing_and_says_so_in_json_and_in_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.config.engine.DEFAULT_KV_CACHE_BYTES", 16 * 2**20)
    folder, path, picture = tmp_path / "model", tmp_path / "profile.json", tmp_path / "shift.svg"
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    steps = StepLatency(Coefficients(2.0, 0.05, 0.0), Coefficients(3.0, 0.0, 0.1), Coefficients(20.0, 0.0, 0.1), 100)
    made = profile(steps)
    facts = replace(made.model, name=str(folder), dtype="float32", weight_bytes=10**6, kv_token_bytes=768)
    write_profile(replace(made, model=facts), path)
    flags = {
        "profile": path,
        "slo": "ttft=2000,tpot=200",
        "before": "prompt=100,output=4",
        "after": "prompt=10,output=20",
        "rates": "8,8",
        "before-s": 3,
        "after-s": 3,
        "interval": 0.3,
        "workers": 2,
        "plot": picture,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    found = CliRunner().invoke(bench, ["replan", str(folder), *given, "--json"])
    assert found.exit_code == 0, found.output
    verdicts = json.loads(found.stdout)["verdicts"]
    assert [verdict["replanned"] for verdict in verdicts] == [False, True]
    assert [verdict["lost"] for verdict in verdicts] == [0, 0]
    assert all(verdict["requests"] > 30 for verdict in verdicts)
    assert picture.read_text().startswith("<svg")
