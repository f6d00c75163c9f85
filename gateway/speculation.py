"""What a request may ask of speculation: the field `speculation`, checked against what the server has.

`false` is no drafts, `true` the server's own choices, and an object says what shall differ from these. A drafter or a
rule that the server does not have is refused, as is a rule under which the output would follow another law than the
model's, unless the operator lets requests ask for such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from core.errors import InvalidRequest
from core.types import SpeculationWish
from gateway.config import SpeculationOffer

NO_TRAIN = "x-slipstream-no-train"


def _choice(value: object) -> object:
    """The object that true or false stands for."""
    if isinstance(value, bool):
        return {} if value else {"budget": 0}
    if not isinstance(value, dict):
        raise PydanticCustomError("speculation", "must be true, false or an object with drafter, rule or budget")
    return value


class SpeculationChoice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    drafter: str | None = None
    rule: str | None = None
    budget: int | None = Field(None, ge=0)


_OFF = SpeculationChoice(budget=0)


class SpeculationFields(BaseModel):
    speculation: Annotated[SpeculationChoice | None, BeforeValidator(_choice)] = None
    store: bool | None = None


def wanted_speculation(
    body: SpeculationFields, offer: SpeculationOffer | None, *, has_logprobs: bool
) -> SpeculationWish | None:
    """Raises InvalidRequest naming the field at fault. `has_logprobs`: whether those of the output are asked for."""
    choice = body.speculation
    if choice is None:
        return None
    if choice == _OFF:
        return SpeculationWish(budget=0)
    if offer is None:
        raise InvalidRequest(
            "speculation: this server drafts nothing; leave it out, or start the server with --speculation",
            param="speculation",
        )
    if choice.drafter is not None:
        _check("drafter", choice.drafter, list(offer.drafters))
    if choice.rule is not None:
        _check("rule", choice.rule, _rules(offer, choice.drafter))
        if has_logprobs and choice.rule != offer.rule_with_logprobs:
            raise _refusal("rule", f"with logprobs it can only be {offer.rule_with_logprobs}; leave out one of them")
    if choice.budget is not None and choice.budget > offer.budget:
        raise _refusal("budget", f"{choice.budget} is above this server's {offer.budget}; lower it")
    return SpeculationWish(drafter=choice.drafter or "", rule=choice.rule or "", budget=choice.budget)


def may_be_remembered(body: SpeculationFields, headers: Mapping[str, str]) -> bool:
    """Unless the client has said no by OpenAI's `store` or our header. Raises InvalidRequest."""
    said = headers.get(NO_TRAIN, "0").strip()
    if said not in ("0", "1"):
        raise InvalidRequest(f"header {NO_TRAIN}: {said[:40]!r} is neither 1 nor 0", param=NO_TRAIN)
    return said == "0" and body.store is not False


def _rules(offer: SpeculationOffer, drafter: str | None) -> list[str]:
    """Those that go with the drafter, or with whichever the server chooses."""
    named = [offer.drafters[drafter]] if drafter is not None else list(offer.drafters.values())
    return [rule for rule in named[0] if all(rule in rules for rules in named)]


def _check(field: str, name: str, known: list[str]) -> None:
    if name not in known:
        names = ", ".join(known) or "none that goes with every drafter, so name the drafter too"
        raise _refusal(field, f"{name[:64]!r} can't be had here; there is {names}")


def _refusal(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"speculation.{field}: {rule}", param=f"speculation.{field}")
