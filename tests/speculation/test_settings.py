"""What an operator may ask of speculation, and what requests may then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from core.errors import ConfigError
from speculation.drafters.registry import DrafterKind, registered
from speculation.laws import DraftLaw
from speculation.settings import Settings
from tests.speculation.copier import COPIER

SMALL = DrafterKind("small_model", laws=(DraftLaw.IID, DraftLaw.WITHOUT_REPLACEMENT), takes_weights=True)


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    with registered(COPIER), registered(SMALL):
        yield


def settings(**given: Any) -> Settings:
    return Settings(**({"drafters": ("copier",), "max_budget": 8, "max_memory_bytes": 2**20} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculation": "small_model"}, "weights small_model: this drafter needs some; give small_model=PATH"),
        ({"speculation": "copyer"}, "no drafter is called 'copyer': did you mean copier?"),
        ({"speculation": "copier,small_modle"}, "did you mean small_model?"),
        ({"speculation_rule": "sampeld"}, "no rule is called 'sampeld': did you mean sampled?"),
        ({"speculation_controller": "good"}, "no controller is called 'good'"),
        (
            {"speculation_rule": "k_seq"},
            "drafter copier: rule k_seq is not lossless for drafts whose law is point_mass",
        ),
        ({"speculation_budget": 512}, "speculation.budget 512 is above what a step has room for"),
        ({"speculation_budget": 64, "max_num_batched_tokens": 64}, "lower it to 63 at most"),
        ({"speculation_budget": 0}, "speculation.budget"),
        ({"speculation_memory": "0"}, "speculation.memory"),
        ({"speculation_memory": "1K"}, "--speculation-memory, which drafters share, must be 64KiB at least"),
        ({"speculation_weights": ("copier=drafts",)}, "weights copier: this drafter takes none"),
        ({"speculation_weights": ("small_model=drafts",)}, "weights small_model: the drafters are copier"),
        ({"speculation_weights": ("drafts",)}, "'drafts' is not name=path; write such as draft_model=drafts/small"),
        ({"speculation_weights": ("copier=a", "copier=b")}, "copier is there twice; give each drafter once"),
        (
            {"speculation": "small_model", "speculation_weights": ("small_model=no/such/folder",)},
            "no/such/folder is not a folder",
        ),
        ({"speculation": "none"}, "has no meaning without a drafter"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line_that_names_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"speculation": "copier", "speculation_budget": 8} | given)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("written", "drafters"),
    [("copier", ("copier",)), ("copier, small_model", ("copier", "small_model")), (["small_model"], ("small_model",))],
)
def test_drafters_are_a_name_or_several(written: object, drafters: tuple[str, ...], tmp_path: Path) -> None:
    weights = (f"small_model={tmp_path}",) if "small_model" in drafters else ()
    found = load(None, {"speculation": written, "speculation_weights": weights}).speculation.settings
    assert found is not None
    assert found.drafters == drafters


def test_without_a_word_nothing_is_drafted() -> None:
    assert SlipstreamConfig().speculation.settings is None


def test_a_file_has_a_section_for_it(tmp_path: Path) -> None:
    drafts, file = tmp_path / "drafts", tmp_path / "serve.yaml"
    drafts.mkdir()
    file.write_text(f"speculation: {{drafter: [small_model], rule: k_seq, weights: {{small_model: {drafts}}}}}")
    found = load(file, {"speculation_budget": 5}).speculation.settings
    assert found is not None
    assert (found.drafters, found.rule, found.max_budget) == (("small_model",), "k_seq", 5)
    assert found.weights == {"small_model": drafts}


@pytest.mark.parametrize(
    ("given", "drafter", "rules"),
    [
        ({}, "copier", {"sampled", "tree"}),
        ({"rule": "chain"}, "copier", {"sampled", "tree", "chain"}),
        ({"allow_lossy": True}, "copier", {"sampled", "tree", "typical"}),
        ({"rule": "typical"}, "copier", {"sampled", "tree", "typical"}),
        ({"drafters": ("small_model",)}, "small_model", {"sampled", "tree", "k_seq"}),
        ({"drafters": ("small_model",), "rule": "tree"}, "small_model", {"sampled", "tree"}),
        ({"drafters": ("small_model",), "rule": "chain"}, "small_model", {"sampled", "tree", "k_seq", "chain"}),
    ],
)
def test_requests_may_ask_for_rules_that_are_right_for_the_drafts_that_are_made(
    given: dict[str, Any], drafter: str, rules: set[str], tmp_path: Path
) -> None:
    """Of the laws that a drafter has the choice of, the operator's rule takes the one that it accepts most of."""
    weights = {"small_model": tmp_path} if drafter == "small_model" else {}
    assert set(settings(weights=weights, **given).rules_for(drafter)) == rules
