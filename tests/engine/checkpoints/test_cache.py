"""The cache holds whole folders or none, for one process at a time."""

import errno
import fcntl
import shutil
import threading
from pathlib import Path

import pytest

from core.errors import ModelError
from engine.checkpoints.cache import MANIFEST, Cache, require_space, size_text
from tests.engine.checkpoints.tiny import Recorder


def put(cache: Cache, key: str, progress: Recorder, content: str = "weights") -> Path:
    with cache.exclusive(key, progress), cache.workspace(key) as work:
        (work / "out").mkdir()
        (work / "out" / "model.safetensors").write_text(content)
        return cache.publish(work / "out", key, name=key, source="a test")


def test_the_folder_comes_from_the_argument_then_the_environment_then_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLIPSTREAM_CACHE": "/s", "XDG_CACHE_HOME": "/x", "HOME": "/h"}.items():
        monkeypatch.setenv(name, value)
    assert Cache(tmp_path).root == tmp_path
    assert Cache().root == Path("/s")
    monkeypatch.delenv("SLIPSTREAM_CACHE")
    assert Cache().root == Path("/x/slipstream")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache().root == Path("/h/.cache/slipstream")


def test_hugging_face_keeps_its_own_cache_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIPSTREAM_CACHE", raising=False)
    assert Cache().hub is None
    assert Cache(tmp_path).hub == tmp_path / "hub"


def test_what_is_published_is_ready_and_listed_with_its_size(tmp_path: Path, progress: Recorder) -> None:
    cache = Cache(tmp_path)
    assert cache.ready("m") is None
    folder = put(cache, "m", progress)
    assert cache.ready("m") == folder
    assert [(entry.name, entry.size) for entry in cache.converted()] == [("m", len("weights"))]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_text("weigh"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"format": 0, "files": {}}'),
    ],
)
def test_a_damaged_folder_is_not_ready_and_can_be_made_again(tmp_path: Path, progress: Recorder, damage) -> None:
    cache = Cache(tmp_path)
    damage(put(cache, "m", progress))
    assert cache.ready("m") is None
    assert put(cache, "m", progress, "new") == cache.ready("m")


def test_a_failed_attempt_leaves_nothing(tmp_path: Path, progress: Recorder) -> None:
    cache = Cache(tmp_path)

    def attempt() -> None:
        with cache.exclusive("m", progress), cache.workspace("m") as work:
            (work / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert not [path for path in cache.models.iterdir() if path.is_dir()]


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path, progress: Recorder) -> None:
    cache = Cache(tmp_path)
    stale, other = cache.models / ".m.tmp-dead", cache.models / ".n.tmp-alive"
    for folder in (stale, other):
        folder.mkdir(parents=True)
        (folder / "half").write_text("written")
    put(cache, "m", progress)
    assert not stale.exists()
    assert other.exists()


def test_a_second_process_waits_for_the_first(tmp_path: Path, progress: Recorder) -> None:
    cache = Cache(tmp_path)
    put(cache, "m", progress)
    waiting, entered = threading.Event(), threading.Event()
    progress.on_begin = lambda label: waiting.set()

    def enter() -> None:
        with cache.exclusive("m", progress):
            entered.set()

    with (cache.models / ".m.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=enter)
        second.start()
        assert waiting.wait(60)
        assert not entered.is_set()
    second.join(60)
    assert entered.is_set()
    assert "waiting for another process" in progress.labels[-1]


def test_a_removed_model_is_gone(tmp_path: Path, progress: Recorder) -> None:
    cache = Cache(tmp_path)
    folder = put(cache, "m", progress)
    cache.remove(cache.converted()[0], progress)
    assert not folder.exists()
    assert cache.converted() == []


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(ModelError, match=r"converting it needs 2\.0 GB and 12 kB is free; free some space"):
        require_space(tmp_path / "not" / "yet", 2 * 10**9, "converting it")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"is full: free some space, or set SLIPSTREAM_CACHE"),
        (errno.EACCES, r"can't write to .* make .* writable, or set SLIPSTREAM_CACHE"),
        (errno.EROFS, r"can't write to"),
        (errno.EIO, r"check the disk"),
    ],
)
def test_what_the_file_system_refuses_is_one_line_of_advice(
    tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, "refused", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ModelError, match=advice) as raised, Cache(tmp_path / "c").exclusive("m", progress):
        pass
    assert "\n" not in raised.value.message


def test_a_file_where_the_cache_should_be_is_named(tmp_path: Path, progress: Recorder) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="is in the way"), Cache(tmp_path / "cache").exclusive("m", progress):
        pass


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 bytes"), (2500, "2.5 kB"), (92_871_040, "93 MB"), (16 * 10**9, "16 GB")]
)
def test_sizes_read_like_a_disk(size: int, text: str) -> None:
    assert size_text(size) == text


def test_real_disks_have_room_for_a_byte(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "a byte")
    with pytest.raises(ModelError):
        require_space(tmp_path, shutil.disk_usage(tmp_path).total + 1, "everything")
