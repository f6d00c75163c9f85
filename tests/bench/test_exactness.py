"""A small cut of `slipstream bench exactness`, on the demo model (`make test` fetches it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.exactness import MARGIN, Case, Reference, compare, read_prompts, reference, run_case
from core.errors import ConfigError
from engine.checkpoints import Silent, resolve

MAX_TOKENS = 12
PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea and the wind that moves over it.",
    "List three uses of a paper clip, one on each line, and say for each of them who would want it and why.",
]


@pytest.fixture(scope="module")
def demo() -> tuple[Path, list[Reference]]:
    folder = resolve("demo", progress=Silent())
    return folder, reference(folder, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize(
    "case",
    [Case(colocated=False, batch=1, chunk=16), Case(colocated=False, batch=3, chunk=2048), Case(True, 3, 16)],
    ids=str,
)
async def test_greedy_output_of_the_demo_model_is_that_of_transformers(
    demo: tuple[Path, list[Reference]], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.config.engine.DEFAULT_KV_CACHE_BYTES", 64 * 2**20)
    counts = await run_case(demo[0], case, demo[1], MAX_TOKENS)
    assert counts["different"] == 0
    assert counts["equal"] + counts["excused"] == len(PROMPTS)


def test_a_divergence_is_excused_only_where_rounding_decides() -> None:
    expected = Reference(prompt=[1], tokens=[5, 6, 7], margins=[1.0, MARGIN / 2, 1.0])
    assert compare(expected, [5, 6, 7]) == "equal"
    assert compare(expected, [5, 9, 9]) == "excused"
    assert compare(expected, [5, 6, 9]) == "different"
    assert compare(expected, [5, 6]) == "different"


def test_a_malformed_prompt_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"turns": ["a"]}) + "\n{}\n")
    assert read_prompts(path, 1) == ["a"]
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2"):
        read_prompts(path, 2)
