"""What transports are called, for who may not import torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

TransportName: TypeAlias = Literal["shared_memory", "tcp", "torch_distributed", "nixl"]

READS_IN_PLACE: frozenset[str] = frozenset({"shared_memory", "nixl"})
"""Those that read the giver's pool where it lies, and so can't carry what was encoded from it."""
