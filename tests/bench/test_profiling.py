"""`slipstream profile` on a tiny random model: which steps run, and what is stored."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace

from bench.profiling.drafting import Effort, measure_drafting
from bench.profiling.measure import RUNS, _seconds
from bench.profiling.neighbours import Work, neighbours
from bench.profiling.steps import DECODES, Stepper
from cluster.cli import cli
from cluster.machine import usable_cores
from core.errors import ConfigError
from engine.checkpoints import Silent
from engine.runner import ModelRunner
from placement.grid import FULL, QUICK, Shape
from placement.layout import Role
from placement.profile import read_profile
from speculation.settings import Settings
from tests.children import children_with
from tests.placement.profiles import disturbed, profile
from tests.tiny import save_byte_tokenizer


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runner(model):
    runner = ModelRunner.load(model, dtype="float32", device="cpu", block_size=16, num_blocks=64)
    yield runner
    runner.shutdown()
    runner.pool.close()


SMALL = ("--quick", "--threads", 1, "--device", "cpu", "--kv-cache-memory", "16MiB")


def profiled(*arguments: object):
    result = CliRunner().invoke(cli, ["profile", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("shape", "tokens", "context"),
    [
        (Shape(((0, 40),)), [40], [0]),
        (Shape(((32, 40), (0, 20))), [20, 40], [0, 32]),
        (Shape((), 3, 50), [1, 1, 1], [50, 50, 50]),
        (Shape((), 2, 50, rows=4), [4, 4], [50, 50]),
        (Shape(((0, 40),), 2, 50), [1, 1, 40], [0, 50, 50]),
    ],
)
def test_a_step_holds_what_its_shape_says_and_nothing_else(runner, monkeypatch, shape, tokens, context) -> None:
    batches, submit = [], runner.submit
    monkeypatch.setattr(runner, "submit", lambda batch: batches.append(batch) or submit(batch))
    seconds = Stepper(runner).seconds(shape)
    assert len(seconds) == len(batches) == (1 if shape.prompts else DECODES)
    starts = batches[0].query_starts
    assert sorted(int(n) for n in starts[1:] - starts[:-1]) == sorted(tokens)
    assert sorted(batches[0].context_lens.tolist()) == sorted(context)
    assert min(seconds) > 0


@pytest.mark.parametrize("grid", [FULL, QUICK])
def test_a_grid_measures_prompts_decodes_verification_and_steps_with_both(grid) -> None:
    shapes = list(grid.shapes())
    assert len(shapes) == len(set(shapes))
    assert any(shape.prompts and shape.sequences for shape in shapes)
    assert any(shape.rows > 1 for shape in shapes)
    assert any(past for shape in shapes for past, _ in shape.prompts)
    assert any(len(shape.prompts) > 1 for shape in shapes)


def test_steps_that_model_or_cache_have_no_room_for_are_left_out() -> None:
    small = FULL.fitting(longest=256, kv_tokens=2000, spare=20)
    assert small
    assert max(shape.longest for shape in small) <= 236
    assert max(shape.kv_tokens(20) for shape in small) <= 2000


def test_the_profile_says_what_was_measured_and_under_what_conditions(model, tmp_path) -> None:
    out = tmp_path / "stored.json"
    result = profiled(model, *SMALL, "--dtype", "float32", "--out", out, "--json")
    stored = read_profile(out)
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert stored.source == "measured"
    assert (stored.model.dtype, stored.model.max_tokens, stored.model.hidden_size) == ("float32", 256, 64)
    assert stored.model.kv_token_bytes == 3 * 2 * 2 * 16 * 4
    assert len(stored.model.fingerprint) == 32
    assert (stored.setting.device, stored.setting.tp, stored.setting.threads) == ("cpu", 1, 1)
    assert stored.setting.hardware.keys() == {"device", "cores"}
    assert stored.setting.versions.keys() == {"slipstream", "torch", "python"}
    assert stored.range.longest <= 256
    assert min(point.ms for point in stored.points) > 0


def test_a_profile_whose_fit_is_off_is_warned_of(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bench.profiling.cli._measured", lambda *_, **__: disturbed())
    assert "warning: the fit of the profile" in profiled("small", "--out", tmp_path / "stored.json").stderr
    monkeypatch.setattr("bench.profiling.cli._measured", lambda *_, **__: profile())
    assert "warning" not in profiled("small", "--out", tmp_path / "stored.json").stderr


def test_a_file_that_cannot_be_written_is_refused_before_minutes_of_measuring(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bench.profiling.cli._measured", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(ConfigError, match=r"--out: .*/none/p\.json can't be written: there is no folder"):
        profiled("small", "--out", tmp_path / "none" / "p.json")


def test_more_threads_than_cores_are_refused(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--threads: 1 x 4096 are more than the"):
        profiled(model, "--threads", 4096, "--out", tmp_path / "stored.json")
    assert not (tmp_path / "stored.json").exists()


@pytest.mark.skipif(usable_cores() < 2, reason="needs a core for each worker")
def test_workers_that_compute_beside_the_measured_one_are_started_and_ended(model, tmp_path, monkeypatch) -> None:
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: started.append(popen(*given, **how)) or started[-1])
    profiled(model, *SMALL, "--beside", 1, "--out", tmp_path / "stored.json")
    stored = read_profile(tmp_path / "stored.json")
    assert stored.setting.beside == 1
    for points in (stored.beside_prompts, stored.beside_decodes):
        assert [replace(point, ms=1.0) for point in points] == [replace(point, ms=1.0) for point in stored.points]
    assert min(stored.contention.prompt + stored.contention.decode) >= 1.0
    beside = [process for process in started if "bench.profiling.neighbours" in process.args]
    assert [process.returncode for process in beside] == [-signal.SIGKILL] * 2  # with prompts, and with decodes


def test_others_stand_still_while_steps_are_measured_alone(model) -> None:
    engine = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "16MiB"}
    work = Work(str(model), engine, 1, [*QUICK.shapes()][:12])
    with neighbours(1, [work]) as (others,):
        (process,) = children_with("bench.profiling.neighbours")
        eventually(lambda: process.status() == psutil.STATUS_STOPPED)
        with others.computing():
            eventually(lambda: process.status() != psutil.STATUS_STOPPED)
        eventually(lambda: process.status() == psutil.STATUS_STOPPED)


def test_a_step_is_measured_beside_others_right_after_it_was_alone() -> None:
    """So that a machine which changes its speed changes it for both."""
    ran: list[tuple[int, bool]] = []

    class Steps:
        def seconds(self, shape: Shape) -> list[float]:
            ran.append((shape.sequences, others.are))
            return [1.0]

    class Others:
        are = False

        @contextmanager
        def computing(self):
            self.are = True
            yield
            self.are = False

    others = Others()
    found = _seconds(Steps(), [Shape((), 1, 8), Shape((), 2, 8)], [None, others], Silent())  # type: ignore[arg-type,list-item]
    assert ran == [(1, False), (1, True), (2, False), (2, True)] * (1 + RUNS)
    assert found == [[[1.0] * RUNS] * 2] * 2


def save_tokenizer_of_questions(model: Path) -> None:
    """The tiny vocabulary has no blank."""
    save_byte_tokenizer(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_profile_says_what_serving_adds_and_what_a_drafter_brings(model, tmp_path) -> None:
    save_tokenizer_of_questions(model)
    flags = [*SMALL, "--dtype", "float32", "--serving", "--speculation", "prompt_lookup", "--draft-tokens", 3]
    profiled(model, *flags, "--out", tmp_path / "stored.json")
    stored = read_profile(tmp_path / "stored.json")
    assert stored.serving is not None
    assert stored.serving.handoff_gap_ms > 0  # two processes and the way between them: more than any hiccup hides
    assert stored.served(Role.BOTH).decode.a >= stored.latency.decode.a
    found = stored.drafting_of("prompt_lookup")
    assert (found.prompts, found.budget) == ("questions of our own", 3)
    assert 1.0 <= found.acceptance_length <= found.rows <= 4.0
    assert found.speculation.rows in (1, 2, 3, 4)


def test_drafts_are_measured_by_a_worker_that_has_timed_its_steps(model, tmp_path, monkeypatch) -> None:
    save_tokenizer_of_questions(model)
    timed = []
    monkeypatch.setattr(
        "bench.profiling.measure.measure_drafting",
        lambda runner, *given: timed.append(list(runner.row_times)) or measure_drafting(runner, *given),
    )
    flags = [*SMALL, "--dtype", "float32", "--speculation", "prompt_lookup", "--draft-tokens", 3]
    profiled(model, *flags, "--out", tmp_path / "stored.json")
    assert [max(time.rows for time in times) for times in timed] == [4]


def test_a_drafter_is_measured_with_the_questions_of_a_file(model, tmp_path, runner) -> None:
    save_byte_tokenizer(model)
    (tmp_path / "asked.jsonl").write_text('{"turns": ["abcabcabcabcabcabc"]}\n')
    settings = Settings(drafters=("prompt_lookup",), max_budget=2, max_memory_bytes=2**20)
    found = measure_drafting(runner, model, settings, tmp_path / "asked.jsonl", Silent(), Effort(2, 16))
    assert (found.drafter, found.prompts, found.budget) == ("prompt_lookup", "asked.jsonl", 2)
    assert found.rows <= 3.0


@pytest.mark.parametrize("step_s", [1e-4, 0.01, 0.05, 0.3])
def test_drafts_are_measured_as_much_as_there_is_time_for(step_s: float) -> None:
    """In batches of two sizes, each answer in as many steps as it has tokens."""
    effort = Effort.within(20.0, step_s)
    assert 2 * effort.rounds * effort.max_tokens * step_s <= 20.0
    assert (effort == Effort()) is (step_s < 0.03)
    assert Effort.within(20.0, 10.0) == Effort(2, 16)


def test_a_drafter_that_needs_weights_is_measured_with_them_only(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="this drafter needs some"):
        profiled(model, "--speculation", "draft_model", "--out", tmp_path / "stored.json")
    with pytest.raises(ConfigError, match="weights has no meaning without a drafter"):
        profiled(model, "--speculation-weights", f"draft_model={model}", "--out", tmp_path / "stored.json")


def test_questions_without_a_drafter_are_refused(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--dataset: it is what a drafter drafts for"):
        profiled(model, "--dataset", tmp_path / "asked.jsonl", "--out", tmp_path / "stored.json")


def test_a_worker_beside_that_cannot_start_is_an_error(model) -> None:
    work = Work(str(model / "none"), {"device": "cpu"}, 1, [Shape(((0, 8),))])
    with pytest.raises(ConfigError, match="--beside: a worker"), neighbours(1, [work]):
        pytest.fail("it can't have been ready")


def test_a_device_that_is_not_here_is_reckoned_from_the_configuration_and_marked(model, tmp_path) -> None:
    result = profiled(model, "--roofline", "H100", "--tensor-parallel-size", 2, "--out", tmp_path / "h100.json")
    stored = read_profile(tmp_path / "h100.json")
    assert (stored.source, stored.setting.device, stored.setting.tp) == ("roofline", "H100", 2)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("a roofline of H100, not measured")
    assert len(lines) == 2 + len(stored.points) + 2
    assert all(line.endswith("%") for line in lines[2:-2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--roofline", "H100", "--quick"), "--quick has no meaning with --roofline"),
        (("--roofline", "H100", "--dtype", "float32"), "--dtype has no meaning with --roofline"),
        (("--roofline", "H900"), "no device 'H900' in the table"),
        (("--roofline", "H100", "--tensor-parallel-size", 3), "does not divide"),
    ],
)
def test_what_means_nothing_for_a_roofline_is_refused(model, tmp_path, flags, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profiled(model, *flags, "--out", tmp_path / "stored.json")
