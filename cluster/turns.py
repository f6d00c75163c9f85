"""Whose turn it is to take blocks of a worker that has hand-offs in both directions, as one that changes its role has.

A prompt holds blocks here until another worker has taken its KV, and so may wait for blocks there. If the other way
round that worker's prompts wait for blocks here, nobody may ever get any. So a prompt takes no blocks before every
reservation that came ahead of it has some. A gateway asks the worker that takes before the one that gives, over links
that keep order; whatever holds the blocks that a hand-off waits for was then asked for before it, and hand-offs that
wait for each other in a circle can't be. More than one gateway would have to agree on an order.
"""

from __future__ import annotations


class Turns:
    """One per worker. A worker with hand-offs in one direction only keeps nobody waiting."""

    def __init__(self) -> None:
        self._reserving: set[str] = set()
        self._ahead: dict[str, set[str]] = {}

    def reserve(self, request_id: str) -> None:
        """A reservation has come; `settle` follows."""
        self._reserving.add(request_id)

    def prompt(self, request_id: str) -> bool:
        """Whether a prompt that is to be handed over has to wait until `settle` names it, which it does even if the
        prompt has ended meanwhile."""
        if self._reserving:
            self._ahead[request_id] = set(self._reserving)
        return bool(self._reserving)

    def settle(self, request_id: str) -> list[str]:
        """A reservation has its blocks, or will never need any. Returns the prompts whose turn has come. Unknown ids
        are ignored: a reservation ends after it has got its blocks."""
        self._reserving.discard(request_id)
        for ahead in self._ahead.values():
            ahead.discard(request_id)
        due = [prompt for prompt, ahead in self._ahead.items() if not ahead]
        for prompt in due:
            del self._ahead[prompt]
        return due
