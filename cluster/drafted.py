"""What workers draft, out of what they count since they started."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from core.types import Role
from core.wire import WorkerStatus
from placement.load import Drafted


class _Counted(NamedTuple):
    generated: int
    drafted: int
    accepted: int


class Drafts:
    """Of all workers that decode, together. A step of a sequence brings one token and those that were accepted; the
    first token of a request counts as a step too, where prompts are computed beside decodes."""

    def __init__(self) -> None:
        self._known: dict[str, _Counted] = {}

    def since(self, workers: Iterable[WorkerStatus]) -> Drafted:
        """Since the last call, of those that were there then and have not started anew. Of a worker that is told of
        several times, the last counts."""
        then, self._known = self._known, {}
        steps = tokens = accepted = 0
        for worker in {worker.worker_id: worker for worker in workers}.values():
            if (now := _counted(worker)) is None:
                continue
            self._known[worker.worker_id] = now
            more = [after - before for after, before in zip(now, then.get(worker.worker_id, now), strict=True)]
            if worker.role is not Role.PREFILL and min(more) >= 0:
                steps, tokens, accepted = steps + more[0] - more[2], tokens + more[1], accepted + more[2]
        return Drafted(steps=max(0, steps), tokens=tokens, accepted=accepted)


def _counted(worker: WorkerStatus) -> _Counted | None:
    if (speculation := worker.counters.speculation) is None:
        return None
    return _Counted(
        worker.counters.generated_tokens,
        sum(one.draft_tokens for one in speculation.drafters),
        sum(one.accepted_tokens for one in speculation.drafters),
    )
