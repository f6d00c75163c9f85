"""A folder is served as it is, once it is known to be whole."""

import json
import struct
from pathlib import Path

import pytest

from core.errors import ModelError
from engine.checkpoints import Silent, resolve


def check(folder: Path) -> Path:
    return resolve(str(folder), progress=Silent())


def test_a_whole_folder_is_itself(model_folder: Path) -> None:
    assert check(model_folder) == model_folder


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]])
def test_each_form_of_tokenizer_is_enough(model_folder: Path, files: list[str]) -> None:
    (model_folder / "tokenizer.json").unlink()
    for name in files:
        (model_folder / name).touch()
    assert check(model_folder) == model_folder


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer.json"), ("model.safetensors", "no \\*.safet")],
)
def test_what_is_missing_is_named(model_folder: Path, missing: str, advice: str) -> None:
    (model_folder / missing).unlink()
    with pytest.raises(ModelError, match=advice):
        check(model_folder)


def test_pickled_weights_are_refused_with_a_way_to_convert_them(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle can run code: convert them .*save_pretrained"):
        check(model_folder)


def test_a_folder_of_gguf_points_to_the_file(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model.gguf")
    with pytest.raises(ModelError, match=r"name the \.gguf file"):
        check(model_folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_configuration_is_refused(model_folder: Path, text: str) -> None:
    (model_folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json is not"):
        check(model_folder)


def test_weights_cut_short_are_refused(model_folder: Path) -> None:
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        check(model_folder)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"{]"])
def test_weights_that_are_not_safetensors_are_refused(model_folder: Path, data: bytes) -> None:
    (model_folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        check(model_folder)


def test_a_git_lfs_pointer_is_recognised(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(ModelError, match="git lfs pull"):
        check(model_folder)


def test_every_shard_of_the_index_must_be_there(model_folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 2 of 3 weight files \(model-2\.safetensors\)"):
        check(model_folder)


def test_an_architecture_the_engine_refuses_is_refused_with_its_reason(model_folder: Path) -> None:
    def refuse(config: dict) -> None:
        raise ModelError(f"{config['architectures'][0]} is not supported")

    with pytest.raises(ModelError, match="LlamaForCausalLM is not supported"):
        resolve(str(model_folder), progress=Silent(), check_config=refuse)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("smollm", "write `demo`, a Hugging Face id"),
        ("", "write `demo`"),
        ("a/b/c", "write `demo`"),
        ("./nowhere", "no such file or folder: ./nowhere"),
        ("models/none.gguf", "no such file or folder: models/none.gguf"),
        ("x" * 5000, "not a path"),
        ("~nobody-of-this-name/m", "not a path"),
    ],
)
def test_a_name_that_means_nothing_is_answered_with_the_forms_it_may_take(model: str, advice: str) -> None:
    with pytest.raises(ModelError, match=advice) as raised:
        resolve(model, progress=Silent())
    assert "\n" not in raised.value.message


def test_a_path_goes_before_a_hugging_face_id(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_folder.parent / "owner").mkdir()
    model_folder.rename(model_folder.parent / "owner" / "name")
    monkeypatch.chdir(model_folder.parent)
    assert resolve("owner/name", progress=Silent()) == model_folder.parent / "owner" / "name"


def test_a_file_that_is_no_model_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a model"):
        check(model_folder / "tokenizer.json")


@pytest.mark.parametrize("model", ["demo", "."])
def test_a_revision_belongs_to_a_hugging_face_id(model: str) -> None:
    with pytest.raises(ModelError, match="--revision"):
        resolve(model, revision="main", progress=Silent())
