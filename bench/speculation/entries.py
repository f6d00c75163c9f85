"""What is measured: each drafter with each rule and controller. No torch.

A drafter that nobody should use is registered while the command runs: it shows what speculation costs where it gives
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from cluster.config.engine import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.notation import parse_bytes
from core.errors import ConfigError
from core.types import Role
from speculation.drafters.registry import DRAFTERS, DrafterKind
from speculation.settings import Settings

USELESS = DrafterKind("useless", module="bench.speculation.useless")
CHOOSES = "bandit"
"""The controller that several drafters can be given to."""
_FLAGS = {
    "drafter": "--drafters",
    "rule": "--rules",
    "controller": "--controllers",
    "memory": "--speculation-memory",
}
"""That set what a ConfigError is about. Those about weights begin with the word."""


def parse_entries(
    drafters: str | None,
    rules: str,
    controllers: str,
    budget: int | None,
    weights: Sequence[str],
    memory: str | None = None,
) -> list[Settings]:
    """All combinations; by default of all drafters that need no weights. Raises ConfigError, naming the flag, for an
    unknown name or what can't go together."""
    if drafters is None:
        drafters = ",".join(k.name for k in DRAFTERS.values() if not k.takes_weights and k is not USELESS)
    if budget is not None and budget >= (rows := EngineSection().batched_tokens(Role.BOTH)):
        raise ConfigError(
            f"--budget: {budget} is above what a step has room for: {rows} tokens, the question's own among them; "
            f"lower it to {rows - 1} at most"
        )
    folders, max_bytes = _folders(weights), _bytes(memory)
    found = [
        _entry(tuple(names.split("+")), rule, controller, budget, folders, max_bytes)
        for names, rule, controller in product(_parts(drafters), _parts(rules), _parts(controllers))
    ]
    if unused := sorted(folders.keys() - {name for entry in found for name in entry.drafters}):
        raise ConfigError(f"--weights: {unused[0]} is not among --drafters; add it, or leave its weights out")
    return found


def _entry(
    drafters: tuple[str, ...],
    rule: str,
    controller: str,
    budget: int | None,
    folders: dict[str, Path],
    max_bytes: int,
) -> Settings:
    try:
        entry = Settings(
            drafters=drafters,
            max_budget=SpeculationSection().budget if budget is None else budget,
            max_memory_bytes=max_bytes,
            rule=rule,
            controller=controller,
            weights={name: folder for name, folder in folders.items() if name in drafters},
        )
    except ConfigError as error:
        flag = _FLAGS.get(error.param or "")
        raise ConfigError(f"{flag}: {error.message}" if flag else f"--{error.message}") from error
    if len(set(drafters)) < len(drafters):
        raise ConfigError(f"--drafters: {'+'.join(drafters)} names a drafter twice; leave one out")
    if len(drafters) > 1 and controller != CHOOSES:
        raise ConfigError(
            f"--controllers: {controller} does not choose among drafters; give {CHOOSES}, or commas for + in "
            f"{'+'.join(drafters)}"
        )
    return entry


def _bytes(memory: str | None) -> int:
    try:
        return parse_bytes(SpeculationSection().memory if memory is None else memory)
    except ValueError as error:
        raise ConfigError(f"--speculation-memory: {error}") from error


def _folders(weights: Sequence[str]) -> dict[str, Path]:
    """Of NAME=FOLDER each."""
    pairs = [part.partition("=") for part in weights]
    if wrong := next((text for text, (_, _, folder) in zip(weights, pairs, strict=True) if not folder), None):
        raise ConfigError(f"--weights: {wrong!r} is not NAME=FOLDER; write it such as draft_model=DIR")
    return {name: Path(folder) for name, _, folder in pairs}


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))
