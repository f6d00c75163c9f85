"""`slipstream models` prints the folder on standard output, and any failure as one line with status 2."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from cluster.cli_models import models
from engine.checkpoints import Silent
from engine.checkpoints.cache import Cache


def run(*arguments: str) -> Result:
    return CliRunner().invoke(models, arguments)


def write_model(folder: Path, architecture: str = "LlamaForCausalLM") -> Path:
    folder.mkdir(parents=True)
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 8, "vocab_size": 16}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **sizes}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache with the demo model in it."""
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    cache = Cache()
    with cache.exclusive("SmolLM2-135M-Instruct", Silent()), cache.workspace("SmolLM2-135M-Instruct") as work:
        cache.publish(write_model(work / "out"), "SmolLM2-135M-Instruct", name="demo", source="a test")
    return tmp_path


def test_pull_prints_the_folder_and_nothing_else(cache: Path) -> None:
    result = run("pull", "demo")
    assert (result.exit_code, result.stdout) == (0, f"{cache}/models/SmolLM2-135M-Instruct\n")
    assert result.stderr == ""


def test_pull_takes_the_cache_from_its_flag(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", "/nonexistent")
    assert run("pull", "demo", "--cache-dir", str(cache)).exit_code == 0


@pytest.mark.parametrize("arguments", [("pull", "smol"), ("pull", "demo", "--revision", "main"), ("rm", "smol")])
def test_a_failure_is_one_line_on_standard_error_and_status_2(cache: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_model_that_cannot_be_served_is_not_pulled(cache: Path) -> None:
    result = run("pull", str(write_model(cache / "mine", "OracleForCausalLM")))
    assert result.exit_code == 2
    assert "OracleForCausalLM is not supported" in result.stderr


def test_ctrl_c_is_one_line_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.checkpoints.resolve", interrupt)
    result = run("pull", "demo")
    assert (result.exit_code, result.stderr) == (130, "error: interrupted; run the same command again to continue\n")


def test_list_shows_name_size_and_folder(cache: Path) -> None:
    result = run("list")
    assert result.exit_code == 0
    name, size, unit, folder = result.stdout.split()
    assert (name, unit, folder) == ("demo", "bytes", f"{cache}/models/SmolLM2-135M-Instruct")
    assert int(size) > 64


def test_list_of_an_empty_cache_says_where_to_start(tmp_path: Path) -> None:
    result = run("list", "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "slipstream models pull demo" in result.stderr


def test_rm_deletes_and_says_what(cache: Path) -> None:
    result = run("rm", "demo")
    assert result.exit_code == 0
    assert result.stdout.startswith("removed demo (")
    assert not (cache / "models" / "SmolLM2-135M-Instruct").exists()
    assert run("rm", "demo").exit_code == 2


def test_pulling_what_is_there_loads_nothing_heavy(cache: Path) -> None:
    code = (
        "import sys; from cluster.cli_models import models; models(['pull', 'demo'], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'ray', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
