"""What a worker has moved, for its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from kv_transfer.states import Outcome


@dataclass(slots=True)
class TransferCounters:
    """Monotonic since start. `bytes` and `seconds` are of committed transfers: at the giver from both sides being ready
    to the taker's word, at the taker from the offer to the commit. `fallbacks` counts transports found unusable."""

    committed: int = 0
    expired: int = 0
    aborted: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    fallbacks: int = 0

    def count(self, outcome: Outcome) -> None:
        match outcome:
            case Outcome.COMMITTED:
                self.committed += 1
            case Outcome.EXPIRED:
                self.expired += 1
            case Outcome.ABORTED:
                self.aborted += 1
            case Outcome.FAILED:
                self.failed += 1
