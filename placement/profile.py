"""What is known of a model on one kind of device: its steps, the latency model fitted to them, and the ranges in which
that holds. Stored as JSON by `slipstream profile`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from core.errors import ConfigError
from placement.fit import Point, distserve_ms, fit, fit_distserve
from placement.latency import StepLatency
from placement.layout import Group, Role
from placement.workload import Workload

FORMAT = 1


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`fingerprint` is of the weights; empty if only the configuration was there."""

    name: str
    fingerprint: str
    dtype: str
    quantization: str | None
    weight_bytes: int
    kv_token_bytes: int
    hidden_size: int
    num_layers: int
    max_tokens: int
    """Longest sequence."""


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under what conditions it holds. `device` is the kind of device, as a topology names it; `hardware` and
    `versions` tell machines and software apart."""

    device: str
    tp: int = 1
    threads: int = 1
    """Of each rank, on a CPU: its device is a core."""
    beside: int = 0
    """Workers alike that computed on the same machine at the same time."""
    hardware: dict[str, str | int] = {}
    versions: dict[str, str] = {}

    @property
    def devices(self) -> int:
        """How many a stage takes."""
        return self.tp * self.threads


class Range(msgspec.Struct, frozen=True):
    """Of the steps that were measured, at the most."""

    tokens: int
    longest: int
    sequences: int
    rows: int


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`source`: its points were measured, or reckoned from a table of devices (roofline.py)."""

    source: Literal["measured", "roofline"]
    model: ModelFacts
    setting: Setting
    points: tuple[Point, ...]
    format: int = FORMAT

    @property
    def latency(self) -> StepLatency:
        return fit(self.points)

    @property
    def range(self) -> Range:
        most = {name: max(getattr(point, name) for point in self.points) for name in Range.__struct_fields__}
        return Range(**most)

    def errors(self) -> list[float]:
        """Of the fit, relative, by point."""
        latency = self.latency
        return [point.error(latency) for point in self.points]

    def beyond(self, group: Group, workload: Workload) -> list[str]:
        """What a group would do with the workload that was never measured, a sentence each."""
        rows = 1 if group.speculation is None else group.speculation.rows
        seats = max(1, group.max_sequences // group.stages)
        asked = {
            "sequences that decode": (seats, self.range.sequences),
            "rows that decode": (seats * rows, self.range.rows),
            "tokens of prompts": (min(group.chunk_tokens, _most_waiting(workload)), self.range.tokens),
        }
        unused = {Role.PREFILL: ("sequences that decode", "rows that decode"), Role.DECODE: ("tokens of prompts",)}
        found = [
            f"steps with {most} {name}, and no more than {known} were measured"
            for name, (most, known) in asked.items()
            if most > known and name not in unused.get(group.role, ())
        ]
        longest = int((workload.prompt_tokens.astype(int) + workload.output_tokens).max())
        if longest > self.range.longest:
            found.append(f"sequences of {longest} tokens, and none longer than {self.range.longest} was measured")
        return found

    def table(self) -> str:
        """Every point with what the fit says of it, and the fit."""
        latency = self.latency
        counts = ("tokens", "squares", "sequences", "rows", "context")
        rows = ["".join(f"{name:>10}" for name in (*counts, "ms", "fit")) + f"{'error':>8}"]
        rows += [
            "".join(f"{getattr(point, name):>10}" for name in counts)
            + f"{point.ms:>10.2f}{point.predicted_ms(latency):>10.2f}{point.error(latency):>+8.1%}"
            for point in self.points
        ]
        if self.source == "roofline":
            rows.insert(0, f"a roofline of {self.setting.device}, not measured: expect errors of tens of percent")
        return "\n".join([*rows, _summary("the fit", self.errors()), _summary("DistServe's form", self._distserve())])

    def _distserve(self) -> list[float]:
        """Errors of DistServe's form, by point that it knows."""
        latency = fit_distserve(self.points)
        plain = [point for point in self.points if not point.tokens and point.rows == point.sequences]
        known = [point for point in self.points if not point.sequences] + plain
        return [distserve_ms(latency, point) / point.ms - 1.0 for point in known]


def _summary(name: str, errors: list[float]) -> str:
    off = [abs(error) for error in errors]
    return f"error of {name}: median {statistics.median(off):.1%}, worst {max(off):.1%} of {len(off)} steps"


def _most_waiting(workload: Workload) -> int:
    """Prompts may queue, so that a step is as large as its limit; without any that are longer than a token there is
    nothing to fill it."""
    return int(np.maximum(workload.prompt_tokens - workload.cached_tokens, 0).sum())


def write_profile(profile: Profile, path: Path) -> None:
    """Raises ConfigError if it can't be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", param="out") from error


def read_profile(path: Path) -> Profile:
    """Raises ConfigError that names the file and what is wrong with it."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
        if found.format != FORMAT:
            raise ConfigError(f"format is {found.format}, not {FORMAT}: profile the model again")
        if not all(0 < point.ms < float("inf") for point in found.points):
            raise ConfigError("points: a step took no time, or no end of it")
        fit(found.points)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="profile") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(
            f"{path} is no profile: {error}; make one with slipstream profile", param="profile"
        ) from error
    return found
