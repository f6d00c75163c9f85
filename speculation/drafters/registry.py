"""All drafters, by name. No torch: drafters are imported when they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from speculation.laws import DraftLaw
from speculation.names import check_name, module_of
from speculation.rules.registry import Rule, check

if TYPE_CHECKING:
    from speculation.drafters.base import Surroundings
    from speculation.protocols import Drafter


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What is known of a drafter before it is made."""

    name: str
    laws: tuple[DraftLaw, ...] = (DraftLaw.POINT_MASS,)
    """By which it can draw, the one it is best at first."""
    takes_weights: bool = False
    """Whether it is read from a checkpoint."""
    needs_prompts: bool = False
    """Whether it makes use of what the target computes of a prompt. Then workers that only prefill have it too, and
    what it makes of a prompt is handed over with the KV."""
    shares_vocabulary: bool = False
    """Whether it is given the target's embedding and output layer."""
    checked_by: str = ""
    """Of one that takes weights, a module without torch whose `check(folder, target, max_memory_bytes, dtype)` says
    before anything is started whether the weights can draft for the model in folder `target`."""
    module: str = ""
    """Where its `build` is, if not in the file of its name."""

    def law_for(self, rule: Rule) -> DraftLaw:
        """That which the rule favours, if it has it, else the first of its laws that the rule can verify. Raises
        ConfigError if there is none."""
        if rule.favours in self.laws:
            return rule.favours
        law = next((law for law in self.laws if law in rule.laws), self.laws[0])
        check(rule, law)
        return law


def _head(name: str) -> DrafterKind:
    checked_by = "speculation.heads.check"
    return DrafterKind(name, takes_weights=True, needs_prompts=True, shares_vocabulary=True, checked_by=checked_by)


_KINDS: tuple[DrafterKind, ...] = (
    DrafterKind("hybrid", needs_prompts=True),
    DrafterKind("prompt_lookup"),
    DrafterKind("suffix"),
    DrafterKind("token_recycling", needs_prompts=True),
    DrafterKind("aded", needs_prompts=True),
    DrafterKind(
        "draft_model",
        laws=(DraftLaw.POINT_MASS, DraftLaw.WITHOUT_REPLACEMENT, DraftLaw.IID),
        takes_weights=True,
        checked_by="speculation.drafters.draft_model_check",
    ),
    _head("medusa"),
    _head("hydra"),
    _head("eagle3"),
)

_BY_NAME = {kind.name: kind for kind in _KINDS}
DRAFTERS: Mapping[str, DrafterKind] = _BY_NAME


@contextmanager
def registered(kind: DrafterKind) -> Iterator[None]:
    """One more, of a name that there is not, in this process while this is open."""
    _BY_NAME[kind.name] = kind
    try:
        yield
    finally:
        del _BY_NAME[kind.name]


def find_drafter(name: str) -> DrafterKind:
    """Raises ConfigError, with the nearest known name, if there is none."""
    check_name("drafter", name, DRAFTERS)
    return DRAFTERS[name]


def make_drafter(name: str, surroundings: Surroundings) -> Drafter:
    """By `build` of the file of its name. Raises ConfigError or ModelError if it can't be made so."""
    module = find_drafter(name).module
    drafter: Drafter = (import_module(module) if module else module_of("drafter", name)).build(surroundings)
    return drafter
