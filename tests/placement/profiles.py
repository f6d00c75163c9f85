"""Profiles of a model whose steps take exactly what a latency model says."""

from __future__ import annotations

from itertools import product

from msgspec.structs import replace

from placement.fit import Point
from placement.latency import StepLatency
from placement.profile import ModelFacts, Profile, Setting
from tests.placement.layouts import STEP

PROMPTS = [((0, tokens),) for tokens in (16, 64, 256, 1024)] + [((512, 64),), ((512, 256),), ((0, 64), (0, 64))]
DECODES = list(product((1, 2, 4, 8, 16, 32), (64, 256, 1024)))


def points(latency: StepLatency) -> tuple[Point, ...]:
    """Steps that take what the model says."""
    steps = [(prompts, 0, 0, 1) for prompts in PROMPTS]
    steps += [((), batch, context, 1) for batch, context in DECODES] + [((), 4, 256, 3), ((), 4, 256, 6)]
    steps += [(((0, 64),), 4, 256, 1), (((0, 256),), 16, 256, 1)]
    without = [Point.of(prompts, sequences, context, rows, 1.0) for prompts, sequences, context, rows in steps]
    return tuple(Point.of(*step, point.predicted_ms(latency)) for step, point in zip(steps, without, strict=True))


def profile(latency: StepLatency = STEP, **changes: object) -> Profile:
    facts = ModelFacts(
        name="small",
        fingerprint="f00",
        dtype="bfloat16",
        quantization=None,
        weight_bytes=10**9,
        kv_token_bytes=10**5,
        hidden_size=64,
        num_layers=4,
        max_tokens=4096,
    )
    values = {"source": "measured", "model": facts, "setting": Setting(device="cpu"), "points": points(latency)}
    return Profile(**values | changes)  # type: ignore[arg-type]


def disturbed(**changes: object) -> Profile:
    """Something else computed during every other of its steps, and most during the last."""
    calm = points(STEP)
    took = [1.0 + 0.4 * (number % 2) for number in range(len(calm) - 1)] + [3.0]
    return profile(points=tuple(replace(p, ms=more * p.ms) for p, more in zip(calm, took, strict=True)), **changes)
