"""`slipstream profile` on a tiny random model: which steps run, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.profiling.steps import DECODES, Stepper
from cluster.cli import cli
from core.errors import ConfigError
from engine.runner import ModelRunner
from placement.grid import FULL, QUICK, Shape
from placement.profile import read_profile
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


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


def profiled(*arguments: object):
    result = CliRunner().invoke(cli, ["profile", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result


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
    result = profiled(model, "--quick", "--threads", 1, "--device", "cpu", "--dtype", "float32", "--out", out, "--json")
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


def test_the_error_of_the_fit_is_printed_for_every_point(model, tmp_path) -> None:
    result = profiled(model, "--quick", "--threads", 1, "--device", "cpu", "--out", tmp_path / "stored.json")
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(read_profile(tmp_path / "stored.json").points) + 2
    assert all(line.endswith("%") for line in lines[1:-2])


def test_more_threads_than_cores_are_refused(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--threads: 1 x 4096 are more than the"):
        profiled(model, "--threads", 4096, "--out", tmp_path / "stored.json")
    assert not (tmp_path / "stored.json").exists()
