from __future__ import annotations

import pytest

from engine.native import library


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    if not library.load():
        pytest.skip("this machine can't have the native kernels")
