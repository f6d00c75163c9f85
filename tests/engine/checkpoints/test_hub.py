"""A Hugging Face id becomes a snapshot in the Hub's own cache, and each refusal one line."""

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from core.errors import ModelError
from engine.checkpoints import hub as checkpoints_hub
from engine.checkpoints import resolve
from engine.checkpoints.hub import cached_models
from tests.engine.checkpoints.tiny import COMMIT, FakeHub, Recorder


def refused(cache: Path, progress: Recorder, model: str = "owner/name", **options) -> str:
    with pytest.raises(ModelError) as raised:
        resolve(model, cache_dir=cache, progress=progress, **options)
    assert "\n" not in raised.value.message
    return raised.value.message


def test_a_model_is_downloaded_with_what_serving_needs_and_no_more(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        (model_folder / name).write_text("not needed")
    hub.publish("owner/name", model_folder)
    folder = resolve("owner/name", cache_dir=tmp_path, progress=progress)
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert folder.name == COMMIT
    weights = (model_folder / "model.safetensors").stat().st_size
    assert ("owner/name: downloading", weights + 2) in progress.updates


def test_the_second_time_nothing_is_downloaded(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    hub.publish("owner/name", model_folder)
    folder = resolve("owner/name", cache_dir=tmp_path, progress=progress)
    hub.served.clear()
    assert resolve("owner/name", cache_dir=tmp_path, progress=progress) == folder
    assert hub.served == []


def test_an_unsupported_architecture_is_refused_before_its_weights_are_fetched(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    def refuse(config: dict) -> None:
        raise ModelError(f"{config['architectures'][0]} is not supported")

    hub.publish("owner/name", model_folder)
    assert refused(tmp_path, progress, check_config=refuse) == "LlamaForCausalLM is not supported"
    assert hub.served == ["config.json"]


def test_pickled_weights_are_refused_before_they_are_fetched(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    hub.publish("owner/name", model_folder)
    assert "no safetensors weights" in refused(tmp_path, progress)
    assert hub.served == ["config.json"]


def test_a_full_disk_is_found_before_the_weights_are_fetched(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("owner/name", model_folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))  # room for config.json
    assert "downloading owner/name needs 1" in refused(tmp_path, progress)
    assert hub.served == ["config.json"]


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "GatedRepo", r"owner/name is gated: accept its terms at http.*/owner/name, then `hf auth login`"),
        (404, "RepoNotFound", r"no model owner/name at"),
        (404, "RevisionNotFound", r"has no revision"),
        (404, "EntryNotFound", r"has no config\.json: if it holds GGUF files"),
        (403, "", r"answered 403 for owner/name: log in with `hf auth login`"),
        (503, "", r"answered 503 for owner/name: wait a minute and pull again"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(
    hub: FakeHub, tmp_path: Path, progress: Recorder, status: int, code: str, advice: str
) -> None:
    hub.refusals["owner/name"] = (status, code)
    assert re.search(advice, refused(tmp_path, progress))


def test_a_revision_that_is_not_there_is_named(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    hub.publish("owner/name", model_folder)
    assert "owner/name has no revision v9" in refused(tmp_path, progress, revision="v9")


def test_a_hub_out_of_reach_is_said(
    hub: FakeHub, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert "can't reach http://127.0.0.1:9 for owner/name" in refused(tmp_path, progress)


def test_offline_a_whole_copy_serves_and_a_missing_one_is_said(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("owner/name", model_folder)
    folder = resolve("owner/name", cache_dir=tmp_path, progress=progress)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/name", cache_dir=tmp_path, progress=progress) == folder
    assert "HF_HUB_OFFLINE is set" in refused(tmp_path, progress, model="owner/other")


def test_offline_half_a_copy_is_not_served(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("owner/name", model_folder)
    folder = resolve("owner/name", cache_dir=tmp_path, progress=progress)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(tmp_path, progress)


def test_what_the_file_system_refuses_is_one_line(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.publish("owner/name", model_folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert "is full: free some space" in refused(tmp_path, progress)


def test_downloaded_models_are_listed_and_can_be_removed(
    hub: FakeHub, model_folder: Path, tmp_path: Path, progress: Recorder
) -> None:
    assert cached_models(tmp_path / "hub") == []
    hub.publish("owner/name", model_folder)
    folder = resolve("owner/name", cache_dir=tmp_path, progress=progress)
    (entry,) = cached_models(tmp_path / "hub")
    assert (entry.name, entry.path) == ("owner/name", folder)
    assert entry.size >= (model_folder / "model.safetensors").stat().st_size
    checkpoints_hub.remove(entry, tmp_path / "hub")
    assert not folder.exists()
    assert cached_models(tmp_path / "hub") == []


def test_a_name_the_hub_does_not_allow_is_said(tmp_path: Path, progress: Recorder) -> None:
    assert "is not a Hugging Face id" in refused(tmp_path, progress, model="owner/na--me")
