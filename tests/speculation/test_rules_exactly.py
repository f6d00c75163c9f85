"""Every rule with every law it takes, by enumeration: the output follows the target's law to the last bit or two."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from core.errors import ConfigError, InternalError
from speculation.laws import DraftLaw
from speculation.rules import k_seq
from speculation.rules.registry import RULES, Rule, check, find_rule
from tests.speculation.enumeration import (
    CHAIN,
    FORK,
    TREE,
    Shape,
    Texts,
    all_drafts,
    mean_accepted,
    output_law,
    total_variation,
)

POINT_MASS, IID, WITHOUT_REPLACEMENT = DraftLaw.POINT_MASS, DraftLaw.IID, DraftLaw.WITHOUT_REPLACEMENT

SHAPES: dict[str, tuple[Shape, int, int]] = {
    # shape, vocabulary, tokens looked at
    "chain": (CHAIN, 3, 4),
    "short chain": (CHAIN[:2], 4, 3),
    "one": (CHAIN[:1], 5, 2),
    "fork": (FORK, 4, 2),  # a vocabulary of 3 would be used up
    "tree": (TREE, 3, 3),
}


def cases() -> list[object]:
    return [
        pytest.param(rule, law, shape, id=f"{rule.name}-{law}-{shape}")
        for rule in RULES.values()
        for law in sorted(rule.laws)
        for shape, (parents, _, _) in SHAPES.items()
        if rule.branches or len(set(parents)) == len(parents)
    ]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "zeros"])
@pytest.mark.parametrize(("rule", "law", "shape"), cases())
def test_the_output_law_is_the_targets_unless_the_rule_is_lossy(
    rule: Rule, law: DraftLaw, shape: str, sparse: bool, record_property: Callable[[str, object], None]
) -> None:
    parents, vocab, length = SHAPES[shape]
    p, q = Texts(vocab, 1, sparse), Texts(vocab, 2, sparse and law is not WITHOUT_REPLACEMENT)
    variation = total_variation(output_law(all_drafts(parents, law, q), rule, p, length), p.joint(length))
    record_property("total_variation", variation)
    assert variation < 1e-12 if rule.lossless else variation > 0.01


def test_k_seq_with_too_small_a_rho_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k_seq, "_least_rho", lambda level, which, q: np.ones(len(which)))
    p, q = Texts(4, 1), Texts(4, 2)
    law = output_law(all_drafts(FORK, IID, q), RULES["k_seq"], p, 2)
    assert total_variation(law, p.joint(2)) > 0.01


def test_k_seq_accepts_more_than_with_the_rho_that_always_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = Texts(4, 1), Texts(4, 2)
    drafts = all_drafts(FORK, IID, q)
    least = mean_accepted(drafts, RULES["k_seq"], p)
    monkeypatch.setattr(k_seq, "_least_rho", lambda level, which, q: np.full(len(which), 3.0))
    assert least > mean_accepted(drafts, RULES["k_seq"], p) + 0.01


@pytest.mark.parametrize("law", sorted(DraftLaw))
def test_a_rule_refuses_the_laws_it_is_not_lossless_for(law: DraftLaw) -> None:
    for rule in RULES.values():
        if law in rule.laws:
            check(rule, law)
        else:
            with pytest.raises(
                ConfigError, match=f"rule {rule.name} is not lossless .* {law}.*: choose one of"
            ) as error:
                check(rule, law)
            assert error.value.param == "rule"


def test_k_seq_takes_independent_drafts_only() -> None:
    assert RULES["k_seq"].laws == {IID}


def test_an_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no rule is called 'k-seq': did you mean k_seq"):
        find_rule("k-seq")


def test_rule_chain_refuses_trees() -> None:
    drafts = all_drafts(FORK, POINT_MASS, Texts(4, 2))
    with pytest.raises(InternalError, match="enumerated proposed a tree to rule chain"):
        output_law(drafts, RULES["chain"], Texts(4, 1), 2)
