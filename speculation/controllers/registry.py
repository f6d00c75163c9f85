"""All controllers, by name. No torch: controllers are imported when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from speculation.names import check_name, module_of

if TYPE_CHECKING:
    from speculation.controllers.base import Limits
    from speculation.protocols import Controller

CONTROLLERS: Mapping[str, str] = {
    "confidence": "goodput, and a request stops drafting where the drafter expects a rejection",
    "dyspec": "goodput for the step as a whole, whose nodes are the likeliest of a larger draft",
    "fixed": "the same budget for every request, whatever it costs",
    "goodput": "the budgets that make the step emit most tokens per second, none if that is best",
    "bandit": "goodput's budgets, and for each class of requests the drafter that does best",
}
DEFAULT_CONTROLLER = "goodput"


def make_controller(name: str, limits: Limits) -> Controller:
    """By `build` of the file of its name. Raises ConfigError if there is none, or it can't be made so."""
    check_name("controller", name, CONTROLLERS)
    controller: Controller = module_of("controller", name).build(limits)
    return controller
