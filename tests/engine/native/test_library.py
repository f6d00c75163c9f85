"""The kernels are compiled once for a machine, and done without where they can't be."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.native import library


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_without_a_compiler_the_log_says_what_to_install(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert library.load() is False
        assert library.load() is False
    [record] = caplog.records
    assert "install g++" in record.getMessage()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "ops.cpp:1: error: no such header" >&2; exit 1'))
    with caplog.at_level(logging.WARNING):
        assert library.load() is False
    assert "no such header" in caplog.text
    assert not library.library_path().exists()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert library.load() is False
    assert "SLIPSTREAM_CACHE" in caplog.text


def test_what_was_compiled_is_not_compiled_again(monkeypatch, tmp_path: Path) -> None:
    last = 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, last))
    assert library._make() is None
    assert library._make() is None
    assert (tmp_path / "runs").read_text() == "run\n"
    assert library.library_path().read_text() == "made\n"


def test_a_file_that_is_no_library_is_named(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'))
    with caplog.at_level(logging.WARNING):
        assert library.load() is False
    assert str(library.library_path()) in caplog.text
