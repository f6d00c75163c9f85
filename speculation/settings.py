"""What an operator asks of speculation, and what requests may ask of it then. No torch: the launcher checks it before
anything is started, and the gateway what requests ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from core.errors import ConfigError
from speculation.controllers.registry import CONTROLLERS, DEFAULT_CONTROLLER
from speculation.drafters.registry import find_drafter
from speculation.laws import DraftLaw
from speculation.names import check_name
from speculation.rules.registry import DEFAULT_RULE, RULES, Rule, find_rule

LEAST_MEMORY = 64 * 1024
"""Bytes of a drafter: some thousand tokens of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Raises ConfigError for names that there are not, and for what does not go together."""

    drafters: tuple[str, ...]
    """By name, the preferred one first; at least one."""
    max_budget: int
    """Most draft tokens for a request in a step."""
    max_memory_bytes: int
    """For all drafters of a worker, who share it evenly."""
    rule: str = DEFAULT_RULE
    """That one may be lossy without `allow_lossy`: naming it is asking for it."""
    controller: str = DEFAULT_CONTROLLER
    weights: Mapping[str, Path] = field(default_factory=dict)
    """Folders, by drafter."""
    allow_lossy: bool = False
    """Whether requests may ask for rules that change the law of the output."""

    def __post_init__(self) -> None:
        check_name("controller", self.controller, CONTROLLERS)
        if self.memory_of_each < LEAST_MEMORY:
            raise ConfigError(
                f"{self.memory_of_each} bytes for each drafter hold next to nothing; --speculation-memory, which "
                f"drafters share, must be {len(self.drafters) * LEAST_MEMORY // 1024}KiB at least",
                param="memory",
            )
        for name in self.drafters:
            self.law_of(name)
            if find_drafter(name).takes_weights and name not in self.weights:
                raise ConfigError(
                    f"weights {name}: this drafter needs some; give {name}=PATH, the folder of a checkpoint"
                )
        for name, folder in self.weights.items():
            self._check_weights(name, folder)

    def law_of(self, drafter: str) -> DraftLaw:
        """By which it draws here, whatever rule a request asks for."""
        try:
            return find_drafter(drafter).law_for(self._rule)
        except ConfigError as error:
            if error.param != "rule":
                raise
            raise ConfigError(f"drafter {drafter}: {error.message}", param="rule") from error

    def check_weights(self, target: Path, dtype: str) -> None:
        """Raises ModelError or ConfigError for weights that can't draft for the model in folder `target`, served in
        `dtype`, which may be auto."""
        for name, folder in self.weights.items():
            if module := find_drafter(name).checked_by:
                import_module(module).check(folder, target, self.memory_of_each, dtype)

    @property
    def device_bytes(self) -> int:
        """What drafters take beside the model, where it is: those that are models themselves."""
        return self.memory_of_each * sum(find_drafter(name).takes_weights for name in self.drafters)

    @property
    def observing_bytes(self) -> int:
        """What drafters take of a worker that only shows them prompts: those that compute something of a prompt."""
        kinds = [find_drafter(name) for name in self.drafters]
        return self.memory_of_each * sum(kind.needs_prompts and kind.takes_weights for kind in kinds)

    @property
    def memory_of_each(self) -> int:
        """Bytes that each drafter of a worker may hold."""
        return self.max_memory_bytes // len(self.drafters)

    @property
    def branches(self) -> bool:
        """Whether drafts may be trees."""
        return self._rule.branches

    def rules_for(self, drafter: str) -> tuple[str, ...]:
        """Those that requests may ask for."""
        law = self.law_of(drafter)
        return tuple(
            rule.name
            for rule in RULES.values()
            if law in rule.laws
            and (rule.branches or not self.branches)
            and (rule.lossless or self.allow_lossy or rule.name == self.rule)
        )

    @property
    def _rule(self) -> Rule:
        return find_rule(self.rule)

    def _check_weights(self, drafter: str, folder: Path) -> None:
        if drafter not in self.drafters:
            raise ConfigError(
                f"weights {drafter}: the drafters are {', '.join(self.drafters)}; add it, or leave the weights out"
            )
        if not find_drafter(drafter).takes_weights:
            raise ConfigError(f"weights {drafter}: this drafter takes none; leave them out")
        if not folder.is_dir():
            raise ConfigError(f"weights {drafter}: {folder} is not a folder; give the one of its checkpoint")
