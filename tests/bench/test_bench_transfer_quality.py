"""`slipstream bench transfer --quality` on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import kl_div

from bench.cli import bench
from bench.prompts import num_equal
from bench.transfer.quality import _divergence
from bench.transfer.subject import Subject
from kv_transfer.codecs.plain import Plain
from kv_transfer.codecs.registry import CODECS
from tests.tiny import save_byte_tokenizer, save_tiny_llama

PROMPTS = ["the-quick-brown-fox-" * 5, "a-lazy-dog", "of-speech" * 10, "jumps-over" * 3]
LOAD = {"dtype": "float32", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [text, "not asked"]}) + "\n" for text in PROMPTS))
    return path


@pytest.fixture(autouse=True)
def threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*args: object):
    flags = ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--max-tokens", "24"]
    return CliRunner().invoke(bench, ["transfer", *flags, *map(str, args)])


def measured(model: Path, prompts: Path, *args: str) -> dict:
    outcome = run("--quality", "--model", model, "--dataset-path", prompts, "--json", *args)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def test_every_codec_is_set_against_the_kv_as_it_is(model, prompts):
    result = measured(model, prompts)
    assert (result["model"], result["dtype"], result["device"]) == (str(model), "float32", "cpu")
    assert list(result["codecs"]) == list(CODECS)
    assert result["prompts"] <= 4
    assert result["positions"] <= 4 * 23
    none = result["codecs"].pop("none")
    assert (none["kl"], none["same_choice"], none["unchanged_tokens"]) == (0, 1, 1)
    assert none["ratio"] == pytest.approx(1, abs=0.01)
    for cost in result["codecs"].values():
        assert 0 < cost["kl"] < 1e-4
        assert 0.5 < cost["same_choice"] <= 1
        assert 0 <= cost["unchanged_tokens"] <= 1
        assert cost["ratio"] > 2
        assert min(cost["encode_gb_s"], cost["decode_gb_s"]) > 0
    assert result["codecs"]["int8"]["kl"] < result["codecs"]["int4"]["kl"]


def test_the_model_goes_on_from_what_came_out_of_the_codec(model, prompts, monkeypatch):
    monkeypatch.setattr(Plain, "_unpack", lambda self, parts, shape: 1000 * torch.randn(shape.size))
    none = measured(model, prompts, "--codecs", "none")["codecs"]["none"]
    assert none["kl"] > 2e-3  # all laws of the tiny model are nearly even
    assert none["same_choice"] < 0.9
    assert none["unchanged_tokens"] < 0.9


def test_prompts_are_spread_over_the_file(model, prompts):
    assert measured(model, prompts, "--codecs", "none", "--num-prompts", "2")["prompts"] == 2


def test_kv_put_back_is_the_kv_that_is_computed_with(model):
    subject = Subject(model, 40, **LOAD)
    try:
        first = subject.prefill(range(3, 23))
        kv = subject.take(20)
        written = subject.generate(first, 20, 12, stop=())
        logits = subject.extend(written, 20)
        subject.put(30 * torch.randn(kv.shape))
        assert (subject.extend(written, 20) - logits).abs().max() > 0.1
        subject.put(kv)
        assert torch.equal(subject.extend(written, 20), logits)
        assert subject.generate(first, 20, 12, stop=()) == written
        assert subject.extend(written[:-1], 20).argmax(-1).tolist() == written[1:]
        assert subject.generate(first, 20, 12, stop=written[3:4])[-1] == written[3]
        assert len(subject.generate(first, 20, 12, stop=written[3:4])) == 1 + written.index(written[3])
    finally:
        subject.close()


def test_the_divergence_is_that_of_kullback_and_leibler():
    before, after = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0))
    reference = kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(_divergence(before, after), reference)
    assert (_divergence(before, before) == 0).all()


@pytest.mark.parametrize(
    ("written", "count"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([5, 2, 3], 0), ([1, 2], 2), ([1, 2, 3, 4], 3)]
)
def test_tokens_count_as_unchanged_up_to_the_first_that_differs(written, count):
    assert num_equal([1, 2, 3], written) == count


def test_without_json_there_is_a_line_for_each_codec(model, prompts):
    outcome = run("--quality", "--model", model, "--dataset-path", prompts, "--codecs", "int8,none,int8")
    assert outcome.exit_code == 0, outcome.output
    assert [line.split()[0] for line in outcome.stdout.splitlines()[1:]] == ["codec", "int8", "none"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--quality"], "--dataset-path: "),
        (["--quality", "--codecs", "int8,zip"], "--codecs: 'zip' is no codec; write some of none,fp8,int8,int4,gear"),
        (["--quality", "--max-tokens", "256"], "--max-tokens: with 256 no prompt of "),
        (["--quality", "--model", "/there/is/no/such/folder"], ""),
    ],
)
def test_a_flag_that_cannot_be_is_refused_in_one_line(model, prompts, args, message):
    dataset = [] if args == ["--quality"] else ["--dataset-path", prompts]
    outcome = run("--model", model, *dataset, *args)
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"Error: {message}")


def test_the_command_line_is_understood_without_loading_torch():
    code = "import sys, bench.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
