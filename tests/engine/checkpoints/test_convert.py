"""A GGUF file becomes the model it was made from, once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.errors import ModelError
from engine.checkpoints import Silent, resolve
from engine.checkpoints.gguf_to_hf import Refused, convert
from tests.engine.checkpoints.tiny import LLAMA3_ROPE, Recorder, tensors, write_gguf


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, cache: Path) -> tuple[Path, Recorder]:
    progress = Recorder()
    return resolve(str(tiny_gguf), cache_dir=cache, progress=progress), progress


def refused(path: Path, tmp_path: Path, **options) -> str:
    with pytest.raises(ModelError) as raised:
        resolve(str(path), cache_dir=tmp_path / "cache", progress=Silent(), **options)
    assert "\n" not in raised.value.message
    assert not [left for left in (tmp_path / "cache" / "models").iterdir() if left.is_dir()]
    return raised.value.message


def test_the_weights_are_the_ones_the_file_was_made_from_in_bfloat16(converted: tuple[Path, Recorder]) -> None:
    import torch
    from safetensors.torch import load_file

    found = load_file(converted[0] / "model.safetensors")
    expected = {name: torch.from_numpy(weight).bfloat16() for name, weight in tensors().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_configuration_names_its_class_and_keeps_llama_3s_scaled_rope(converted: tuple[Path, Recorder]) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 500_000.0}
    assert config["tie_word_embeddings"]


def test_generation_ends_with_the_sequence_or_the_turn(converted: tuple[Path, Recorder]) -> None:
    generation = json.loads((converted[0] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["pad_token_id"] == 2


def test_the_tokenizer_splits_digits_the_way_its_vocabulary_was_learned(converted: tuple[Path, Recorder]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    assert tokenizer.encode("a\n\n12").tokens == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


def test_the_chat_template_comes_along(converted: tuple[Path, Recorder]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 131072


def test_each_step_is_reported(converted: tuple[Path, Recorder]) -> None:
    steps = [label.removeprefix("tiny.gguf: ") for label in converted[1].labels]
    assert steps == [
        "reading",
        "reading the vocabulary",
        "dequantizing",
        "loading the weights",
        "writing the weights",
        "checking the result",
    ]
    assert ("tiny.gguf: dequantizing", 21) in converted[1].updates


def test_the_second_time_nothing_is_converted(
    tiny_gguf: Path, cache: Path, converted: tuple[Path, Recorder], progress: Recorder
) -> None:
    assert resolve(str(tiny_gguf), cache_dir=cache, progress=progress) == converted[0]
    assert progress.labels == []


def test_another_file_of_the_same_name_is_another_model(
    tiny_gguf: Path, cache: Path, converted: tuple[Path, Recorder], tmp_path: Path
) -> None:
    from engine.checkpoints.convert import _key

    data = bytearray(tiny_gguf.read_bytes())
    data[-1] ^= 1
    (tmp_path / "tiny.gguf").write_bytes(data)
    os.utime(tmp_path / "tiny.gguf", ns=(tiny_gguf.stat().st_atime_ns, tiny_gguf.stat().st_mtime_ns))
    assert _key(tmp_path / "tiny.gguf") != _key(tiny_gguf) == converted[0].name


def test_an_architecture_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    said = refused(write_gguf(tmp_path / "m.gguf", architecture="plamo2"), tmp_path)
    assert "architecture 'plamo2' can't be converted" in said


def converter_says(path: Path, tmp_path: Path, prompt: str | None = None) -> str:
    """The converter's own refusal, without its process."""
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused) as raised:
        convert(path, tmp_path / "out", "m", prompt, lambda event: None)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pre_tokenizer_that_is_not_known_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", pre="of-the-future")
    assert "pre-tokenizer 'of-the-future' is not known" in converter_says(file, tmp_path)


def test_a_tensor_the_model_would_drop_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    assert "some would be lost" in converter_says(file, tmp_path)


def test_rope_factors_of_another_rule_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
    assert "rope factors are not Llama 3's" in converter_says(file, tmp_path)


def test_a_chat_template_that_says_something_else_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    assert "its chat template writes" in converter_says(tiny_gguf, tmp_path, prompt="User: Hi")


def test_rope_scaling_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", rope_scaling="yarn")
    assert "rope scaling 'yarn' is not read" in converter_says(file, tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"GGUF\3\0\0\0" + b"\1" * 8])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    assert "not a whole GGUF file" in converter_says(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_file_cut_short_is_refused(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    data = tiny_gguf.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(share * len(data))])
    assert "not a whole GGUF file" in converter_says(tmp_path / "m.gguf", tmp_path)


def test_an_unsupported_configuration_stops_the_conversion_before_the_weights(tiny_gguf: Path, tmp_path: Path) -> None:
    def refuse(config: dict) -> None:
        raise ModelError(f"{config['architectures'][0]} is not supported")

    assert refused(tiny_gguf, tmp_path, check_config=refuse) == "LlamaForCausalLM is not supported"


def test_a_full_disk_stops_the_conversion_before_the_weights(tiny_gguf: Path, tmp_path: Path, full_disk: None) -> None:
    assert "tiny.gguf in bfloat16 needs 50 MB and 12 kB is free" in refused(tiny_gguf, tmp_path)


def test_a_converter_that_is_killed_is_reported(tiny_gguf: Path, tmp_path: Path, progress: Recorder) -> None:
    import psutil

    progress.on_begin = lambda label: [child.kill() for child in psutil.Process().children()]
    with pytest.raises(ModelError, match=r"converting tiny\.gguf \(.*\) was killed, most likely for want of memory"):
        resolve(str(tiny_gguf), cache_dir=tmp_path, progress=progress)


KILLED_WHILE_CONVERTING = """
import os, signal, sys
from pathlib import Path
from engine.checkpoints import Silent, resolve

class Kill(Silent):
    def begin(self, label, total=None, unit="steps"):
        if label.endswith("reading the vocabulary"):
            os.kill(os.getpid(), signal.SIGKILL)

resolve(sys.argv[1], cache_dir=Path(sys.argv[2]), progress=Kill())
"""


def test_a_pull_killed_halfway_leaves_nothing_ready_and_the_next_one_succeeds(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_CONVERTING, str(tiny_gguf), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert [name for name in left if ".tmp-" not in name] == []
    assert left

    folder = resolve(str(tiny_gguf), cache_dir=tmp_path, progress=Silent())
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == [folder]
