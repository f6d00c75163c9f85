"""How the workers of a running cluster are used: what replanning changes."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from core.types import Role
from placement.worker_shape import WorkerShape, devices_of


class Arrangement(Struct, frozen=True, omit_defaults=True):
    """How many workers have each role, and how many tokens a step of any of them takes. Shapes are None where all
    workers have the one that they were started with. `prefill_shape` is that of the others where nobody prefills."""

    prefill: int
    decode: int
    both: int
    chunk_tokens: int
    prefill_shape: WorkerShape | None = None
    decode_shape: WorkerShape | None = None
    """Of workers with both roles, too."""

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.both

    @property
    def devices(self) -> int:
        """That they take; where shapes don't change each counts as one."""
        return sum(count * devices_of(shape) for shape, count in self.counts.items())

    @property
    def counts(self) -> dict[WorkerShape | None, int]:
        """Workers by shape."""
        found = Counter({self.prefill_shape: self.prefill})
        found[self.decode_shape] += self.decode + self.both
        return {shape: count for shape, count in found.items() if count}

    @property
    def of_shapes(self) -> dict[WorkerShape, int]:
        """The same, where shapes may change."""
        return {shape: count for shape, count in self.counts.items() if shape is not None}

    def reshaped_in(self, to: Arrangement) -> bool:
        """Whether workers of some shapes give way there to workers of others."""
        before, after = self.counts, to.counts
        more = [after.get(shape, 0) - before.get(shape, 0) for shape in {*before, *after}]
        return min(more, default=0) < 0 < max(more, default=0)

    def of(self, role: Role) -> int:
        """Workers with this role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.BOTH: self.both}[role]

    def shape(self, role: Role) -> WorkerShape | None:
        return self.prefill_shape if role is Role.PREFILL else self.decode_shape

    def __str__(self) -> str:
        names = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "of both roles"}
        counts = [f"{self.of(role)} {name}{self._shape_text(role)}" for role, name in names.items() if self.of(role)]
        return f"{' + '.join(counts) or 'no workers'}, steps of {self.chunk_tokens} tokens"

    def _shape_text(self, role: Role) -> str:
        shape = self.shape(role)
        return "" if shape is None else f" ({shape})"
