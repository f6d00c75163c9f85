"""What is known of a model on one kind of device: its steps, the latency model fitted to them, and the ranges in which
that holds. Stored as JSON by `slipstream profile`."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from core.errors import ConfigError
from core.files import write_text
from placement.bounded import Bytes, Few, Many
from placement.fit import Point, distserve_ms, fit, fit_contention, fit_distserve
from placement.latency import Coefficients, Contention, Speculation, StepLatency
from placement.layout import ALONE, Group, Role
from placement.workload import Workload

FORMAT = 1
DOUBTFUL = 0.05
"""Of the fit's errors the median, from which a profile is doubted: 0.02 is usual on a machine at rest, and a plan whose
steps are off by more can't have medians that are true within a tenth."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`fingerprint` is of the weights; empty if only the configuration was there."""

    name: str
    fingerprint: str
    dtype: str
    quantization: str | None
    weight_bytes: Bytes
    kv_token_bytes: Bytes
    hidden_size: Many
    num_layers: Many
    max_tokens: Many
    """Longest sequence."""


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under what conditions it holds. `device` is the kind of device, as a topology names it; `hardware` and
    `versions` tell machines and software apart."""

    device: str
    tp: Few = 1
    threads: Few = 1
    """Of each rank, on a CPU: its device is a core."""
    beside: Few = 0
    """Workers alike that computed on the same machine while steps were measured beside them."""
    hardware: dict[str, str | int] = {}
    versions: dict[str, str] = {}

    @property
    def devices(self) -> int:
        """How many a stage takes."""
        return self.tp * self.threads


class Serving(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request sees beyond the steps themselves, of workers and a gateway that had little to do: before its first
    token, and for each token of its prompt; in each step that decodes, and for each sequence in it; where prompts are
    handed over, in each of their steps, whose layers tell of what they have written while it is sealed and copied, and
    between first and second token. `contention` is that of workers which serve through
    one gateway, the median of some rounds, with the quartiles of these; None if it was not measured."""

    overhead_ms: float
    prompt_token_ms: float
    step_ms: float
    sequence_ms: float
    handoff_step_ms: float = 0.0
    handoff_gap_ms: float = 0.0
    handoff_decode: float | None = None
    """How many times as long decodes take while a prompt is computed beside them that is handed over to their worker:
    KV is taken meanwhile. None if it was not measured."""
    contention: Contention | None = None
    contention_quartiles: tuple[Contention, Contention] | None = None


class Drafting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a drafter did for answers to some prompts, with no more than `budget` draft tokens a step: a sequence got
    `acceptance_length` tokens in a step for `rows` rows, means both; a step's drafting and verifying took `draft_ms`
    and `draft_sequence_ms` more for each sequence."""

    drafter: str
    prompts: str
    """The file they are from, or what else they were."""
    budget: int
    acceptance_length: float
    rows: float
    draft_ms: float
    draft_sequence_ms: float

    @property
    def speculation(self) -> Speculation:
        return Speculation.of(self.acceptance_length, self.rows, self.draft_ms, self.draft_sequence_ms)


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
    beside_prompts: tuple[Point, ...] = ()
    beside_decodes: tuple[Point, ...] = ()
    """The same steps beside `setting.beside` other workers that compute prompts, and such that decode."""
    serving: Serving | None = None
    drafting: tuple[Drafting, ...] = ()
    format: int = FORMAT

    @property
    def latency(self) -> StepLatency:
        return fit(self.points)

    def drafting_of(self, drafter: str) -> Drafting:
        """Raises ConfigError if it was not measured."""
        found = next((one for one in self.drafting if one.drafter == drafter), None)
        if found is None:
            raise ConfigError(
                f"--speculation {drafter}: the profile does not know it; profile with --speculation {drafter}, or give "
                "--acceptance-length",
                param="speculation",
            )
        return found

    def served(self, role: Role) -> StepLatency:
        """Of steps in a worker that serves; as they were measured if it is not known what that adds."""
        latency, around = self.latency, self.serving
        if around is None:
            return latency
        more = around.handoff_step_ms if role is Role.PREFILL else 0.0
        prompt, large_prompt = (
            found and Coefficients(found.a + more, found.b + around.prompt_token_ms, found.c)
            for found in (latency.prompt, latency.large_prompt)
        )
        decode, large = (
            Coefficients(a + around.step_ms, b, c + around.sequence_ms)
            for a, b, c in (latency.decode, latency.large_decode)
        )
        return replace(
            latency, prompt=prompt or latency.prompt, large_prompt=large_prompt, decode=decode, large_decode=large
        )

    @property
    def contention(self) -> Contention:
        """Of workers that serve, or if that is not known of such that only compute."""
        if self.serving is not None and self.serving.contention is not None:
            return self.serving.contention
        if not self.beside_prompts:
            return ALONE
        return fit_contention(self.points, self.beside_prompts, self.beside_decodes, self.setting.beside)

    @property
    def decode_contention(self) -> Contention:
        """Of workers that only decode what is handed over to them."""
        found, around = self.contention, self.serving
        if around is None or around.handoff_decode is None:
            return found
        return replace(found, decode=(max(found.decode[0], around.handoff_decode), found.decode[1]))

    @property
    def range(self) -> Range:
        most = {name: max(getattr(point, name) for point in self.points) for name in Range.__struct_fields__}
        return Range(**most)

    def errors(self) -> list[float]:
        """Of the fit, relative, by point."""
        latency = self.latency
        return [point.error(latency) for point in self.points]

    def doubt(self) -> str | None:
        """Why not to rely on it, a sentence; None if its steps follow the model as those of a machine at rest do."""
        if self.source == "roofline":
            return None
        errors = self.errors()
        median, place = statistics.median(map(abs, errors)), max(range(len(errors)), key=lambda n: abs(errors[n]))
        if median <= DOUBTFUL:
            return None
        stage, worst = f"{self.setting.devices} {self.setting.device}", self.points[place]
        return (
            f"the fit of the profile with {stage} a stage is off by {median:.0%} in the median, most by "
            f"{errors[place]:+.0%} for {worst.told}: something else computed meanwhile; profile again alone"
        )

    def beyond(self, group: Group, workload: Workload | None) -> list[str]:
        """What a group would do with the workload that was never measured, a sentence each. With None, for any may
        come, nothing is said of how long sequences are."""
        rows = 1 if group.speculation is None else group.speculation.rows
        seats = max(1, group.max_sequences // group.stages)
        asked = {
            "sequences that decode": (seats, self.range.sequences),
            "rows that decode": (seats * rows, self.range.rows),
            "tokens of prompts": (
                group.chunk_tokens if workload is None else min(group.chunk_tokens, _most_waiting(workload)),
                self.range.tokens,
            ),
        }
        unused = {Role.PREFILL: ("sequences that decode", "rows that decode"), Role.DECODE: ("tokens of prompts",)}
        found = [
            f"steps with {most} {name}, and no more than {known} were measured"
            for name, (most, known) in asked.items()
            if most > known and name not in unused.get(group.role, ())
        ]
        if workload is None:
            return found
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
        rows += [_summary("the fit", self.errors()), _summary("DistServe's form", self._distserve())]
        if self.beside_prompts:
            for place, what in enumerate(("prompts", "decodes")):
                prompt, decode = (self._beside(kind, place) for kind in ("prompt", "decode"))
                rows.append(f"beside another's {what} prompts take {prompt} times as long, decodes {decode}")
        if self.serving is not None and (more := self.serving.handoff_decode) is not None:
            rows.append(f"beside prompts that are handed over to their worker decodes take {more:.2f} times as long")
        return "\n".join(rows)

    def _beside(self, kind: str, place: int) -> str:
        """`1.12`, and where rounds were compared `1.12 (1.06 to 1.19 in half of the rounds)`."""
        factor: float = getattr(self.contention, kind)[place]
        if self.serving is None or self.serving.contention_quartiles is None:
            return f"{factor:.2f}"
        low, high = (getattr(quartile, kind)[place] for quartile in self.serving.contention_quartiles)
        return f"{factor:.2f} ({low:.2f} to {high:.2f} in half of the rounds)"

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
    write_text(path, msgspec.json.format(msgspec.json.encode(profile)).decode(), "out")


def read_profile(path: Path) -> Profile:
    """Raises ConfigError that names the file and what is wrong with it."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
        if found.format != FORMAT:
            raise ConfigError(f"format is {found.format}, not {FORMAT}: profile the model again")
        beside = (found.beside_prompts, found.beside_decodes)
        if not all(0 < point.ms < float("inf") for point in found.points + beside[0] + beside[1]):
            raise ConfigError("points: a step took no time, or no end of it")
        fit(found.points)
        if any(beside) and ({len(some) for some in beside} != {len(found.points)} or not found.setting.beside):
            raise ConfigError("beside_prompts, beside_decodes: have the steps of points, beside setting.beside others")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="profile") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(
            f"{path} is no profile: {error}; make one with slipstream profile", param="profile"
        ) from error
    return found
