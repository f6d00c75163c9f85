"""Whole numbers in files of layouts, topologies and profiles: none so large that there would be no memory for so many
groups, or that sums of them would not fit the 64 bits of the simulator."""

from __future__ import annotations

from typing import Annotated

import msgspec

Few = Annotated[int, msgspec.Meta(le=10_000)]
"""Of groups, nodes, devices, stages."""
Many = Annotated[int, msgspec.Meta(le=10**12)]
"""Of tokens, sequences."""
Bytes = Annotated[int, msgspec.Meta(ge=1, le=10**15)]
