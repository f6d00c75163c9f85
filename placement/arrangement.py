"""How the workers of a running cluster are used: what replanning changes."""

from __future__ import annotations

from msgspec import Struct

from core.types import Role


class Arrangement(Struct, frozen=True):
    """How many workers have each role, and how many tokens a step of any of them takes."""

    prefill: int
    decode: int
    both: int
    chunk_tokens: int

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.both

    def of(self, role: Role) -> int:
        """Workers with this role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.BOTH: self.both}[role]

    def __str__(self) -> str:
        names = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "of both roles"}
        counts = [f"{self.of(role)} {name}" for role, name in names.items() if self.of(role)]
        return f"{' + '.join(counts) or 'no workers'}, steps of {self.chunk_tokens} tokens"
