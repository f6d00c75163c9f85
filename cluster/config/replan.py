"""`replan`: for which targets workers change in service, and how often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cluster.config.section import Section
from cluster.notation import AbsolutePath, AbsolutePaths, StepSizes, WorkerShapes
from core.errors import ConfigError
from placement.forecast_names import SEASONAL, ForecastName
from placement.worker_shape import WorkerShape, parse_shapes

if TYPE_CHECKING:
    from placement.outcome import Targets


class ReplanSection(Section):
    mode: Literal["off", "advise", "on"] = Field(
        "off",
        description="Change roles, numbers and steps of workers in service, as traffic does; advise: only say how",
    )
    slo: str | None = Field(None, description="Targets in ms for it, as ttft=200,tpot=50 or with e2e=9000")
    share: float = Field(0.9, gt=0, lt=1, description="Of the requests, that are to meet all targets")
    profile: AbsolutePath | None = Field(None, description="What slipstream profile measured of such a worker")
    forecast: ForecastName = Field("constant", description="How the traffic to come is foreseen")
    season: float | None = Field(
        None,
        gt=0,
        description="Seconds after which traffic repeats itself, for the forecasts holt-winters and prophet; default: "
        "it does not",
    )
    warm_start: AbsolutePath | None = Field(
        None, description="A trace, such as an earlier traffic log, with which the forecast begins"
    )
    interval: float = Field(
        5.0, ge=0.1, le=3600, description="Between two looks at queues and attainment, seconds; forecasts take 6 such"
    )
    horizon: float = Field(120.0, gt=0, description="Over which a change has to gain more than it costs, seconds")
    floor: int = Field(1, ge=1, le=1024, description="Workers that a role keeps at the least, if it is used at all")
    max_workers: int | None = Field(
        None, ge=1, le=1024, description="Workers that may be started in all; default: their number stays as it is"
    )
    chunk_tokens: StepSizes = Field(
        (), description="Tokens in one step to choose from, as 256,512; default: steps stay as they are"
    )

    shapes: WorkerShapes = Field(
        (), description="TP and PP of workers to choose from, as 1x1,2x1; default: they stay as they are"
    )
    further_profiles: AbsolutePaths = Field(
        (), description="With shapes: what slipstream profile measured of workers of each other TP, as FILE,FILE"
    )

    @classmethod
    def flag(cls, name: str) -> str:
        return "replan" if name == "mode" else f"replan_{name}"

    @model_validator(mode="after")
    def _goes_together(self) -> ReplanSection:
        if self.mode == "off":
            if others := sorted(self.model_fields_set - {"mode"}):
                raise ValueError(f"{others[0]} has no meaning while replan is off; use advise or on, or leave it out")
            return self
        for name, lacks in (("slo", "such as ttft=200,tpot=50"), ("profile", "a file of slipstream profile")):
            if getattr(self, name) is None:
                raise ValueError(f"replan {self.mode} needs a replan {name}: give one, {lacks}")
        if self.season is not None and self.forecast not in SEASONAL:
            raise ValueError(f"season has no meaning with forecast {self.forecast}: take {' or '.join(SEASONAL)}")
        try:
            self.targets  # noqa: B018 - raises
        except ConfigError as error:
            raise ValueError(error.message) from error
        return self

    @model_validator(mode="after")
    def _profiles_have_shapes(self) -> ReplanSection:
        if self.further_profiles and not self.shapes:
            raise ValueError("further_profiles has no meaning without replan shapes; leave it out")
        return self

    @property
    def worker_shapes(self) -> tuple[WorkerShape, ...]:
        return parse_shapes(",".join(self.shapes)) if self.shapes else ()

    @property
    def targets(self) -> Targets:
        """Raises ConfigError."""
        from placement.slo import of_all_together, parse_slo  # with numpy, which `--help` does without

        return of_all_together(parse_slo(self.slo or ""))
