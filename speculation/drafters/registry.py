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
    module: str = ""
    """Where its `build` is, if not in the file of its name."""

    def law_for(self, rule: Rule) -> DraftLaw:
        """The first of its laws that the rule can verify. Raises ConfigError if there is none."""
        law = next((law for law in self.laws if law in rule.laws), self.laws[0])
        check(rule, law)
        return law


_KINDS: tuple[DrafterKind, ...] = (
    DrafterKind("hybrid"),
    DrafterKind("prompt_lookup"),
    DrafterKind("suffix"),
    DrafterKind("token_recycling"),
    DrafterKind("aded"),
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
