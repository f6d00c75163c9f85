"""Devices by name, as their makers state them: what a roofline is reckoned from for one that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """`tflops`: dense, of 16-bit matrices summed in 32 bits; `read_gb_s`: of its memory; `link_gb_s`: one way, to
    another device of its node, if the node has the links it is sold with."""

    tflops: float
    read_gb_s: float
    memory_gb: float
    link_gb_s: float
    per_node: int = 8


DEVICES = {
    "A100": Device(312, 2039, 80, 300),
    "H100": Device(989, 3350, 80, 450),
    "H200": Device(989, 4800, 141, 450),
    "L40S": Device(362, 864, 48, 32),
    "RTX4090": Device(165, 1008, 24, 32),
    "MI300X": Device(1307, 5300, 192, 64),
    "cpu": Device(0.1, 10, 8, 10, per_node=64),
}
"""Of the versions that are mounted on boards of eight where there are several. `cpu` is one core of a server; these
differ by a factor of several, so profile yours."""


def device(name: str) -> Device:
    """Raises ConfigError that names those there are."""
    known = {key.lower(): found for key, found in DEVICES.items()}
    if (found := known.get(_plain(name))) is None:
        raise ConfigError(f"no device {name!r} in the table: it has {', '.join(DEVICES)}", param="device")
    return found


def kind_of(name: str) -> str:
    """The table's name for what a driver calls "NVIDIA H100 80GB HBM3"; the name itself if the table has none."""
    plain = _plain(name)
    return next((key for key in DEVICES if key != "cpu" and key.lower() in plain), name)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "")
