"""The same budget for every request that can take it, whatever it costs."""

from __future__ import annotations

from speculation.acceptance import Acceptance
from speculation.controllers.base import BaseController, Limits
from speculation.rounds import Budgets, Load


class Fixed(BaseController):
    def budget(self, load: Load, stats: Acceptance) -> Budgets:  # noqa: ARG002
        tokens = self.room(load)
        return Budgets(tokens, tokens, self.preferred(load))


def build(limits: Limits) -> Fixed:
    return Fixed(limits)
