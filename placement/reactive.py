"""The fast loop of replanning: which targets are missed now, and which role has room to help.

It moves one worker, or the size of steps by one, on what is measured; the simulator may only object. So it helps where
the profile is wrong. Where the role that has room has no worker to spare, all come to do both, if the simulator finds
that better: nothing was measured of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from core.types import Role
from placement.arranged import Predictor
from placement.arrangement import Arrangement
from placement.live_log import Met
from placement.load import Load, RoleLoad
from placement.replan_settings import ReplanSettings
from placement.slo import shown

LEAST_JUDGED = 5


@dataclass(frozen=True)
class Look:
    """At one moment."""

    settings: ReplanSettings
    predictor: Predictor
    now: Arrangement
    load: Load
    met: Met

    def step(self) -> tuple[Arrangement, str] | None:
        """One step that helps whoever misses targets, and why; None if nobody does, or nobody can help."""
        late, slow = self._late(), self._slow()
        if (late is None) == (slow is None):
            return None  # nothing is missed, or all is
        if self.now.counts.keys() != {self.now.decode_shape}:
            return None  # another role would take another worker
        if self.now.both:
            return self._resized(late, slow)
        helping = Role.PREFILL if late is None else Role.DECODE
        if self.now.of(helping) <= self.settings.least_workers:
            why = f"{late or slow}; of those that {helping.value} none can be spared"
            return replace(self.now, prefill=0, decode=0, both=self.now.workers), why
        if late is not None:
            room = self._tokens_ms(self.load.of(Role.DECODE), self.now.decode - 1)
            able = room <= self.settings.goal.targets.tpot_ms
            to = replace(self.now, prefill=self.now.prefill + 1, decode=self.now.decode - 1)
            return (to, f"{late}; with one worker fewer a token takes {shown(room)} ms") if able else None
        room = self._wait_ms(self.load.of(Role.PREFILL), self.now.prefill - 1)
        able = room <= self.settings.goal.targets.ttft_ms
        to = replace(self.now, prefill=self.now.prefill - 1, decode=self.now.decode + 1)
        return (to, f"{slow}; with one worker fewer prompts wait {shown(room)} ms") if able else None

    def _late(self) -> str | None:
        """How first tokens are late, if they are."""
        role = Role.BOTH if self.now.both else Role.PREFILL
        wait_ms, target = self._wait_ms(self.load.of(role), self.now.of(role)), self.settings.goal.targets.ttft_ms
        if wait_ms > target:
            tokens = self.load.of(role).waiting_prompt_tokens
            return f"prompts wait {shown(wait_ms)} ms for {tokens} tokens before them"
        return self._missed(self.met.late, "first tokens")

    def _slow(self) -> str | None:
        """How further tokens are slow, if they are."""
        role = Role.BOTH if self.now.both else Role.DECODE
        token_ms, target = self._tokens_ms(self.load.of(role), self.now.of(role)), self.settings.goal.targets.tpot_ms
        if token_ms > target:
            return f"a token takes {shown(token_ms)} ms with {self.load.of(role).running} sequences"
        return self._missed(self.met.slow, "further tokens")

    def _missed(self, missed: int, what: str) -> str | None:
        judged, allowed = self.met.judged, 1 - self.settings.goal.share
        if judged < LEAST_JUDGED or missed <= allowed * judged:
            return None
        return f"{missed} of the last {judged} requests got {what} too late"

    def _wait_ms(self, load: RoleLoad, workers: int) -> float:
        """Until the last prompt that waits is computed."""
        if not workers:
            return float("inf")
        return self.predictor.prompt_ms(load.waiting_prompt_tokens / workers, self.now)

    def _tokens_ms(self, load: RoleLoad, workers: int) -> float:
        return self.predictor.token_ms(load, workers, self.now)

    def _resized(self, late: str | None, slow: str | None) -> tuple[Arrangement, str] | None:
        """Longer steps take more of the prompts at once, and make those who decode beside them wait longer."""
        sizes, size = self.settings.chunk_tokens, self.now.chunk_tokens
        if late is not None:
            other = min((longer for longer in sizes if longer > size), default=None)
        else:
            other = max((shorter for shorter in sizes if shorter < size), default=None)
        return None if other is None else (replace(self.now, chunk_tokens=other), late or slow or "")
