"""What `nvidia-smi topo -m` and the kernel say of links: between GPUs, and from them to network cards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError

_NVLINK_GB_S = 25.0
"""One way, of each of the links that the matrix counts: of the third and fourth generation alike."""
_PCIE_GB_S = {"PIX": 25.0, "PXB": 25.0, "PHB": 20.0, "NODE": 15.0, "SYS": 12.0}
"""By how far apart they are on the bus; about what copies reach between devices of the fourth generation."""
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CARD = re.compile(r"(?:NIC\d+|mlx\w+)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """GB/s one way: `between` of the slowest pair of GPUs, 0 if there is one GPU; `out` from the GPU that is farthest
    from a network card to the card that is nearest to it, None if there is no card."""

    between: float
    out: float | None


def parse_matrix(text: str) -> Matrix:
    """Raises ConfigError for links that nobody has told us of."""
    lines = [_ESCAPE.sub("", line) for line in text.splitlines()]
    header = next((line for line in lines if re.match(r"\s+GPU0\b", line)), "")
    names = re.findall(rf"\b(?:GPU\d+|{_CARD.pattern})\b", header)
    rows = [line.split()[1 : 1 + len(names)] for line in lines if re.match(r"GPU\d+\s", line)]
    if not rows or any(len(row) < len(names) for row in rows):
        raise ConfigError("nvidia-smi topo -m says nothing of GPUs: write a topology file instead")
    cells = [dict(zip(names, row, strict=True)) for row in rows]
    between = [_gb_s(kind) for row in cells for name, kind in row.items() if name.startswith("GPU") and kind != "X"]
    cards = [[_gb_s(kind) for name, kind in row.items() if _CARD.fullmatch(name)] for row in cells]
    return Matrix(min(between, default=0.0), min(max(row) for row in cards) if all(cards) else None)


def _gb_s(kind: str) -> float:
    if kind in _PCIE_GB_S:
        return _PCIE_GB_S[kind]
    if re.fullmatch(r"NV\d+", kind):
        return _NVLINK_GB_S * int(kind[2:])
    raise ConfigError(f"nvidia-smi topo -m has a link {kind!r}: write a topology file instead")


def card_gb_s(root: Path = Path("/sys/class")) -> float | None:
    """Of the fastest network card here, as the kernel has it: InfiniBand's rate, else an interface's speed. None if it
    says neither."""
    rates = [_number(file) / 8 for file in root.glob("infiniband/*/ports/*/rate")]
    speeds = [_number(file) / 8000 for file in root.glob("net/*/speed") if file.parent.name != "lo"]
    return max((rate for rate in rates or speeds if rate > 0), default=None)


def _number(file: Path) -> float:
    """ "400 Gb/sec (4X NDR)" -> 400; 0 for an interface that is down, whose speed can't be read or is -1."""
    try:
        words = file.read_text(encoding="ascii").split()
        return max(0.0, float(words[0])) if words else 0.0
    except (OSError, ValueError):
        return 0.0
