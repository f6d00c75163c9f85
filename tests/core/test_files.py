"""Files that a command is to write, looked at before it works for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from core.files import check_writable, write_text


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("as it was")
    for path in (old, tmp_path / "new.json"):
        check_writable(path, "out")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert old.read_text() == "as it was"


@pytest.mark.parametrize("where", ["missing/new.json", "."])
def test_what_cannot_be_written_is_refused_by_the_flag(tmp_path: Path, where: str) -> None:
    for attempt in (lambda: check_writable(tmp_path / where, "out"), lambda: write_text(tmp_path / where, "", "out")):
        with pytest.raises(ConfigError, match=r"--out: .* can't be written: "):
            attempt()
