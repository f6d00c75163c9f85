"""Which prefixes the workers have cached, as a gateway believes: what it has sent them, in units of the digest chain.

A belief, not a fact: another gateway's requests are not in it, and a worker may have evicted what is. It costs nothing
to keep, and a wrong one costs time only, for the worker looks for itself.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

from core.types import Request
from engine.block_manager import UNIT, extend_unit_digests


def digests_of(request: Request, output_token_ids: Sequence[int] = (), known: Sequence[bytes] = ()) -> list[bytes]:
    """Of the full units of the prompt and what follows it, of which the first `known` need not be computed again. None
    if it must not be found in a cache."""
    digests = list(known)
    if request.sampling.prompt_logprobs is None:
        tokens = [*request.prompt_token_ids, *output_token_ids]
        extend_unit_digests(digests, tokens, request.cache_salt, request.adapter)
    return digests


class KnownPrefixes:
    """Per worker the digests of the units sent to it, least recently used first, as many as its cache can hold."""

    def __init__(self) -> None:
        self._units: defaultdict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)

    def remember(self, worker_id: str, digests: Sequence[bytes], max_tokens: int) -> None:
        """The worker has, or is about to have, the KV of these; `max_tokens` is what its cache holds."""
        units = self._units[worker_id]
        for digest in reversed(digests):  # a prefix outlives what extends it, here as there
            units[digest] = None
            units.move_to_end(digest)
        while len(units) * UNIT > max_tokens:
            units.popitem(last=False)

    def cached_tokens(self, digests: Sequence[bytes]) -> Mapping[str, int]:
        """How many tokens of the prefix each worker has; without those that have none."""
        found = {worker_id: _matched(digests, units) * UNIT for worker_id, units in self._units.items()}
        return {worker_id: tokens for worker_id, tokens in found.items() if tokens}

    def drop(self, worker_id: str, digests: Sequence[bytes]) -> None:
        """The worker has not kept the KV of these."""
        for digest in digests:
            self._units[worker_id].pop(digest, None)

    def forget(self, worker_id: str) -> None:
        """The worker is gone, and its cache with it."""
        self._units.pop(worker_id, None)


def _matched(digests: Sequence[bytes], units: OrderedDict[bytes, None]) -> int:
    return next((index for index, digest in enumerate(digests) if digest not in units), len(digests))
