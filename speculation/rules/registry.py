"""All verify rules, by name, and what each may be used for. No torch: rules are imported when they first verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import ConfigError
from speculation.laws import DraftLaw
from speculation.names import check_name, module_of

if TYPE_CHECKING:
    from speculation.protocols import Dice
    from speculation.rounds import Outcome, TargetRows
    from speculation.tree import DraftBatch

_ALL = frozenset(DraftLaw)


@dataclass(frozen=True, slots=True)
class Rule:
    """Implements protocols.VerifyRule by `verify` of the file of its name."""

    name: str
    laws: frozenset[DraftLaw]
    branches: bool = True
    reads_laws: bool = True
    lossless: bool = True
    favours: DraftLaw = DraftLaw.POINT_MASS
    """By which it accepts most, for drafters that have the choice."""

    def verify(self, drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome:
        outcome: Outcome = module_of("rule", self.name).verify(drafts, rows, dice)
        return outcome


RULES = {
    rule.name: rule
    for rule in (
        Rule("sampled", _ALL, reads_laws=False),
        Rule("chain", _ALL, branches=False, favours=DraftLaw.IID),
        Rule("tree", _ALL, favours=DraftLaw.WITHOUT_REPLACEMENT),
        Rule("k_seq", frozenset({DraftLaw.IID}), favours=DraftLaw.IID),
        Rule("typical", _ALL, lossless=False),
    )
}
DEFAULT_RULE = "sampled"


def find_rule(name: str) -> Rule:
    """Raises ConfigError, with the nearest known name, if there is none."""
    check_name("rule", name, RULES)
    return RULES[name]


def check(rule: Rule, law: DraftLaw) -> None:
    """Raises ConfigError unless `rule` can verify drafts of this law."""
    if law not in rule.laws:
        good = ", ".join(sorted(other.name for other in RULES.values() if other.lossless and law in other.laws))
        raise ConfigError(
            f"rule {rule.name} is not lossless for drafts whose law is {law}, only for {', '.join(sorted(rule.laws))}: "
            f"choose one of {good}",
            param="rule",
        )
