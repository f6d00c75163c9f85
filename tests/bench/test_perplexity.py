"""The perplexity that `slipstream bench engine` prints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM

from bench.cli import bench
from bench.engine_speed import perplexity, roofline
from bench.engine_speed.perplexity import measure_perplexity, read_texts
from core.errors import ConfigError
from tests.tiny import save_tiny_llama

LOAD = {"dtype": "float32", "device": "cpu", "threads": 1}
TEXTS = ["the-quick-brown-fox-" * 9, "a", "ofspeech" * 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """The tiny model with a tokenizer of single bytes; those of ASCII but the blanks are in its vocabulary."""
    folder = tmp_path_factory.mktemp("model")
    reference = save_tiny_llama(folder)
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return reference, folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in TEXTS))
    return path


def expected(reference: LlamaForCausalLM, folder: Path, window: int) -> tuple[float, int]:
    tokenizer, losses = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for text in TEXTS:
        ids = torch.tensor(tokenizer.encode(text).ids)
        for part in ids.split(window):
            if len(part) > 1:
                with torch.inference_mode():
                    scores = reference(part[None]).logits[0, :-1].log_softmax(-1)
                losses.append(-scores.gather(1, part[1:, None]))
    every = torch.cat(losses)
    return math.exp(every.mean()), len(every)


def test_it_is_that_of_transformers_over_all_windows(model, texts, monkeypatch):
    monkeypatch.setattr(perplexity, "WINDOW", 64)
    reference, folder = model
    result = measure_perplexity(folder, texts, 10_000, None, **LOAD)
    value, count = expected(reference, folder, 64)
    assert result == {"perplexity": pytest.approx(value, rel=1e-4), "perplexity_tokens": count}


def test_quantization_is_set_against_the_model_as_it_is(model, texts):
    result = measure_perplexity(model[1], texts, 10_000, "int8", **LOAD)
    plain = measure_perplexity(model[1], texts, 10_000, None, **LOAD)
    assert result["perplexity"] == plain["perplexity"] != result["perplexity_quantized"]
    assert result["perplexity_change"] == result["perplexity_quantized"] / result["perplexity"] - 1
    assert abs(result["perplexity_change"]) < 0.05


@pytest.mark.parametrize("most", [1, 50, 200])
def test_no_more_tokens_than_asked_for_are_scored(model, texts, most):
    assert measure_perplexity(model[1], texts, most, None, **LOAD)["perplexity_tokens"] == most


def test_texts_come_from_turns_text_prompt_or_whole_files(tmp_path):
    lines = [{"turns": ["a", "b"]}, {"text": "c"}, {"prompt": "d"}, {"timestamp": 3}, {"turns": []}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "a.txt").write_text("whole\nfile")
    (tmp_path / "c.csv").write_text("1,2")
    assert list(read_texts(tmp_path)) == ["whole\nfile", "a\n\nb", "c", "d"]
    assert list(read_texts(tmp_path / "a.txt")) == ["whole\nfile"]


@pytest.mark.parametrize(
    ("content", "message"), [("{}\n", "holds no text"), ("{}\n{", "line 2 of"), (b"\xff", "cannot read")]
)
def test_files_of_no_use_are_named(model, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"--perplexity-texts: .*{message}|--perplexity-texts: {message}"):
        measure_perplexity(model[1], path, 100, None, **LOAD)


def test_the_command_prints_it(model, texts, monkeypatch):
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    args = ["--batch", "1", "--context", "40", "--prefill", "1x20", "--runs", "1", "--dtype", "float32"]
    args += ["--device", "cpu", "--threads", "1", "--quantization", "int8", "--perplexity-texts", str(texts)]
    threads = torch.get_num_threads()
    try:
        printed = CliRunner().invoke(bench, ["engine", "--model", str(model[1]), *args, "--perplexity-tokens", "60"])
        as_json = CliRunner().invoke(bench, ["engine", "--model", str(model[1]), *args, "--json"])
    finally:
        torch.set_num_threads(threads)
    assert printed.exit_code == as_json.exit_code == 0, printed.output + as_json.output
    assert "over 60 tokens, int8 " in printed.stdout
    result = json.loads(as_json.stdout)
    assert result["quantization"] == "int8"
    assert result["perplexity_change"] == result["perplexity_quantized"] / result["perplexity"] - 1


def test_bytes_that_a_quantized_step_reads_are_fewer(model):
    from engine.model_config import ModelConfig

    reference, folder = model
    config = ModelConfig.from_folder(folder)
    plain, quantized = (roofline.weight_bytes(folder, config, 2, how) for how in (False, True))
    assert plain - quantized == sum(p.numel() for n, p in reference.named_parameters() if n.endswith("_proj.weight"))
