"""A drafter that wants to see prompts, and fails when it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from speculation.drafters.registry import DrafterKind
from speculation.rounds import DraftRequest, Needs, Observed
from tests.speculation.copier import Copier


class Failing(Copier):
    name: ClassVar[str] = "failing"
    needs = Needs(top=1)

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        raise RuntimeError("can't read")


build = Failing
FAILING = DrafterKind("failing", needs_prompts=True, module="tests.speculation.failing")
