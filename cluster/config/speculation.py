"""`speculation`: who drafts, and how drafts are verified."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from cluster.config.section import Section
from cluster.notation import DrafterNames, DrafterWeights, Size, parse_bytes
from core.errors import ConfigError
from speculation.controllers.registry import CONTROLLERS, DEFAULT_CONTROLLER
from speculation.drafters.registry import DRAFTERS
from speculation.rules.registry import DEFAULT_RULE, RULES
from speculation.settings import Settings

DEFAULT_DRAFTER = "none"


class SpeculationSection(Section):
    drafter: DrafterNames = Field(
        DEFAULT_DRAFTER,
        validate_default=True,
        description=f"Who drafts tokens, which the model then verifies several at once: {', '.join(DRAFTERS)}, or some "
        "of them with commas between; none does without",
    )
    rule: str = Field(
        DEFAULT_RULE,
        description=f"How drafts are verified: {', '.join(RULES)}. Naming one that is not lossless (typical) is asking "
        "for it",
    )
    controller: str = Field(
        DEFAULT_CONTROLLER, description=f"Who says how much is drafted in a step: {', '.join(CONTROLLERS)}"
    )
    budget: int = Field(24, gt=0, description="Draft tokens of a request in a step, at most")
    memory: Size = Field("256MiB", description="What the drafters of one worker may hold together")
    weights: DrafterWeights = Field({}, description="Checkpoints of drafters that take one, name=path of a folder each")
    allow_lossy: bool = Field(
        False, description="Let requests ask for rules that are not lossless; the one that `rule` names they may anyway"
    )

    @classmethod
    def flag(cls, name: str) -> str:
        return "speculation" if name == "drafter" else f"speculation_{name}"

    @model_validator(mode="after")
    def _goes_together(self) -> SpeculationSection:
        try:
            idle = self.settings is None
        except ConfigError as error:
            raise ValueError(error.message) from error
        if idle and (others := sorted(self.model_fields_set - {"drafter"})):
            raise ValueError(f"{others[0]} has no meaning without a drafter; name one, or leave it out")
        return self

    @property
    def together(self) -> str | None:
        """Who drafts, as a profile names them; None without a drafter."""
        return ",".join(self.drafter) or None

    @property
    def settings(self) -> Settings | None:
        """None without a drafter. Raises ConfigError for what does not go together."""
        if not self.drafter:
            return None
        return Settings(
            drafters=self.drafter,
            max_budget=self.budget,
            max_memory_bytes=parse_bytes(self.memory),
            rule=self.rule,
            controller=self.controller,
            weights={name: Path(folder) for name, folder in self.weights.items()},
            allow_lossy=self.allow_lossy,
        )
