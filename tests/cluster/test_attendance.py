"""A worker that no longer announces itself says so to who asks for its health."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from cluster import attendance
from cluster.attendance import Attendance
from cluster.config.engine import EngineSection
from cluster.membership import Member, Orders, Plan
from cluster.node import WorkerNode
from core.errors import Unavailable
from core.types import Role
from engine.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="a")
ORDERS = Orders(Role.BOTH, Plan(wanted={Role.BOTH: 1}))


async def attending(monkeypatch: pytest.MonkeyPatch, *answers: Orders | Exception) -> Attendance:
    """One that is given these answers, and then the last of them over and over."""
    monkeypatch.setattr(attendance, "ANNOUNCE_PERIOD_S", 0.0)
    left = list(answers)
    given = asyncio.Event()

    async def announce(_member: Member) -> Orders:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if answer is answers[-1]:
            given.set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def set_role(_role: Role, _tokens: int) -> None:
        pass

    node = cast("WorkerNode", SimpleNamespace(set_role=set_role))
    member = Member(worker_id="a", address="a:1", role=Role.BOTH, layout=LAYOUT)
    found = Attendance(node, member, EngineSection(), announce)
    await found.start()
    await given.wait()
    await asyncio.sleep(0)
    return found


async def test_what_ends_the_announcements_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await attending(monkeypatch, ORDERS, RuntimeError("no memory for a drafter"))
    with pytest.raises(RuntimeError, match="no memory for a drafter"):
        found.check_health()
    await found.leave()


async def test_a_controller_that_is_away_for_a_while_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await attending(monkeypatch, ORDERS, Unavailable("away"), Unavailable("away"), ORDERS)
    found.check_health()
    await found.leave()
