"""`slipstream bench speculation` on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import speculation.rules.sampled
from bench.cli import bench
from bench.speculation.arms import Arm, answer_by_turns, blocks_of
from bench.speculation.entries import USELESS
from bench.speculation.plot import svg
from bench.speculation.step_times import ROWS, draft_of, free_rows, verification
from core.types import SamplingParams
from engine.runner import ModelRunner
from speculation.dice import KeyedDice
from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.drafters.registry import DRAFTERS, DrafterKind, registered
from speculation.rounds import DraftRequest, Outcome, TargetRows
from speculation.tree import DraftBatch
from tests.bench.test_speculation_report import SUMMARY
from tests.tiny import save_byte_tokenizer, save_tiny_llama

TASKS = ["writing", "qa", "qa", "coding", "rag", "rag", "qa", "rag"]
LOAD = ["--dtype", "float32", "--device", "cpu", "--threads", "1"]
SMALL = ["--max-tokens", "12", "--budget", "4"]


class Scripted(BaseDrafter):
    """Proposes what the text before last time went on with; raises if the script says so."""

    name = "scripted"
    answers: dict[tuple[int, ...], Sequence[int]] = {}  # noqa: RUF012  shared on purpose
    fails = False

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._requests: dict[int, DraftRequest] = {}

    def start(self, request: DraftRequest) -> None:
        self._requests[request.key] = request

    def finish(self, key: int) -> None:
        request = self._requests.pop(key)
        self.answers[tuple(request.token_ids[: request.num_prompt_tokens])] = list(request.token_ids)

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        if self.fails:
            raise RuntimeError("no [idea]")
        texts = [self.answers.get(tuple(one.token_ids[: one.num_prompt_tokens]), ()) for one in requests]
        chains = [
            text[len(one.token_ids) : len(one.token_ids) + budget]
            for one, text, budget in zip(requests, texts, budgets, strict=True)
        ]
        return DraftBatch.of_chains(chains, self.law, self.name)


def build(surroundings: Surroundings) -> Scripted:
    return Scripted(surroundings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [
        {"question_id": 70 + place, "category": task, "turns": [f"{task}-{'what-is-this?' * place}", "not-asked"]}
        for place, task in enumerate(TASKS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Scripted]]:
    monkeypatch.setattr(Scripted, "answers", {})
    with registered(DrafterKind("scripted", module=__name__)):
        yield Scripted


def run(model: Path, *args: object) -> Result:
    return CliRunner().invoke(bench, ["speculation", "--model", str(model), *LOAD, *map(str, args)])


def measured(model: Path, dataset: Path, *args: object) -> dict[str, Any]:
    outcome = run(model, "--dataset", dataset, *SMALL, *args, "--json")
    assert outcome.exit_code == 0, outcome.output
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


# --- what the command reports ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(model: Path, dataset: Path) -> dict[str, Any]:
    return measured(model, dataset, "--drafters", "useless", "--controllers", "fixed,goodput", "--batch", "1,3")


def test_every_number_comes_with_the_conditions_it_holds_under(
    found: dict[str, Any], model: Path, dataset: Path
) -> None:
    assert found.keys() == {
        *("model", "dataset", "dtype", "device", "threads", "versions"),
        *("max_tokens", "temperature", "ignore_eos", "budget", "margin", "results"),
    }
    assert (found["model"], found["dataset"], found["budget"], found["margin"]) == (str(model), str(dataset), 4, 1e-3)
    assert [(one["controller"], one["batch"]) for one in found["results"]] == [
        ("fixed", 1),
        ("goodput", 1),
        ("fixed", 3),
        ("goodput", 3),
    ]


def test_all_keys_are_there_for_all_questions_and_for_each_task(found: dict[str, Any]) -> None:
    for one in found["results"]:
        assert one.keys() == {
            *("drafters", "rule", "controller", "batch", "all", "tasks", "goals", "divergences", "switched_off"),
        }
        assert all(of.keys() == SUMMARY for of in (one["all"], *one["tasks"].values()))
        assert sum(of["questions"] for of in one["tasks"].values()) == one["all"]["questions"]
        assert sum(of["tokens"] for of in one["tasks"].values()) == one["all"]["tokens"]


def test_a_goal_that_is_missed_fails_the_command_that_is_strict(
    model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--dataset", dataset, *SMALL, "--drafters", "useless", "--controllers", "fixed", "--batch", "2")
    monkeypatch.setattr("bench.speculation.goals.MOST_DRAFTING", 1.0)
    assert run(model, *args, "--strict").exit_code == 0
    monkeypatch.setattr("bench.speculation.goals.MOST_DRAFTING", 0.0)
    lenient, strict = run(model, *args), run(model, *args, "--strict")
    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    assert "useless, sampled, fixed, batch 2: draft_share is" in lenient.stdout


def test_spec_benchs_categories_of_conversation_are_one_task(found: dict[str, Any]) -> None:
    assert set(found["results"][0]["tasks"]) == {"mt_bench", "qa", "rag"}


def test_only_full_batches_are_asked(found: dict[str, Any]) -> None:
    assert [one["all"]["questions"] for one in found["results"]] == [8, 8, 6, 6]


def test_random_drafts_are_of_no_use(found: dict[str, Any]) -> None:
    for one in found["results"]:
        assert (one["all"]["alpha"] or 0.0) < 0.2
        assert 1.0 <= one["all"]["tau"] < 1.2
    fixed = found["results"][0]["all"]
    assert len(fixed["accepted_per_position"]) == 4
    assert fixed["draft_share"] > 0
    assert fixed["verify_share"] > 0
    assert fixed["speedup_low"] < fixed["speedup"] < fixed["speedup_high"]


def test_right_drafts_are_accepted_and_change_no_answer(model: Path, dataset: Path, scripted: type[Scripted]) -> None:
    args = ("--drafters", "scripted", "--controllers", "fixed", "--batch", "2")
    nothing_known, all_known = (measured(model, dataset, *args)["results"][0] for _ in range(2))
    assert nothing_known["all"]["tau"] == 1
    assert nothing_known["all"]["alpha"] is None
    assert all_known["all"]["alpha"] == 1
    assert all_known["all"]["tau"] > 3
    assert nothing_known["divergences"] == all_known["divergences"] == []


def test_both_sides_of_a_pair_take_their_steps_by_turns(
    model: Path, dataset: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[Arm] = []
    turn = Arm.turn
    monkeypatch.setattr(Arm, "turn", lambda arm: turned.append(arm) or turn(arm))
    measured(model, dataset, "--drafters", "scripted", "--batch", "2")
    paired = [arm for arm in turned if arm is not turned[0]]  # that one says how the model rounds
    plain, drafting = paired[:2]
    assert plain is not drafting
    assert paired == [plain, drafting] * (len(paired) // 2)


def test_the_clock_of_a_side_stands_still_while_the_other_takes_its_turn(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ModelRunner.load(model, dtype="float32", device="cpu", threads=1, block_size=16, num_blocks=32)
    blocks = blocks_of(runner)
    arms = [Arm(runner, 1, None, blocks), Arm(runner, 1, None, blocks)]
    turn = arms[1].turn
    late = [0.0]

    def slowly() -> bool:
        late[0] += 1000.0
        return turn()

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr("bench.speculation.arms.time", clock)
    arms[1].turn = slowly  # type: ignore[method-assign]
    answers = answer_by_turns(arms, [[1, 2, 3]], [SamplingParams(max_tokens=8, temperature=0.0)])
    assert [one.token_ids for (one,) in answers] == [answers[0][0].token_ids] * 2
    assert answers[0][0].seconds < 1000
    assert answers[0][0].steps == answers[1][0].steps == 7
    assert blocks.num_free == runner.pool.num_blocks
    for arm in arms:
        arm.close()
    runner.shutdown()
    runner.pool.close()


def accept_all(batch: DraftBatch, rows: TargetRows, dice: KeyedDice) -> Outcome:
    lasts = np.where(batch.lengths > 0, batch.root_rows + batch.lengths, batch.root_rows)
    return Outcome.of(batch, np.ones(batch.num_nodes, np.bool_), rows.tokens[lasts])


def test_an_answer_that_speculation_has_changed_is_found(
    model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation.rules.sampled, "verify", accept_all)
    args = ("--dataset", dataset, *SMALL, "--drafters", "useless", "--controllers", "fixed", "--batch", "2")
    outcome = run(model, *args, "--json")
    assert outcome.exit_code == 1
    (one,) = json.loads(outcome.stdout)["results"]
    assert len(one["divergences"]) == 8
    assert {found["question_id"] for found in one["divergences"]} == set(range(70, 78))
    for found in one["divergences"]:
        assert found["position"] < 3
        assert found["excused"] == (found["margin"] < 1e-3)
    outcome = run(model, *args)
    assert outcome.exit_code == 1
    assert "8 of 8 answers are others than without" in outcome.stdout


def test_in_16_bits_it_is_found_as_well(model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("--dtype", "bfloat16", "--drafters", "useless", "--controllers", "fixed", "--batch", "2")
    right = measured(model, dataset, *short)
    monkeypatch.setattr(speculation.rules.sampled, "verify", accept_all)
    outcome = run(model, "--dataset", dataset, *SMALL, *short, "--json")
    assert outcome.exit_code == 1
    found = json.loads(outcome.stdout)
    assert found["margin"] == right["margin"] < 0.1
    assert sum(not one["excused"] for one in found["results"][0]["divergences"]) > 4


def test_drawn_answers_are_not_compared(model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation.rules.sampled, "verify", accept_all)
    args = ("--drafters", "useless", "--controllers", "fixed", "--batch", "2", "--temperature", "1")
    assert measured(model, dataset, *args)["results"][0]["divergences"] == []


def test_a_drafter_that_fails_is_named(
    model: Path, dataset: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "fails", True)
    outcome = run(
        model, "--dataset", dataset, *SMALL, "--drafters", "scripted", "--controllers", "fixed", "--batch", "4"
    )
    assert outcome.exit_code == 0
    assert "scripted was switched off: it raised RuntimeError: no [idea]" in outcome.stdout


def test_for_people_there_is_a_leaderboard_and_a_plot(model: Path, dataset: Path, tmp_path: Path) -> None:
    args = ("--drafters", "useless", "--controllers", "fixed,goodput", "--batch", "2")
    outcome = run(model, "--dataset", dataset, *SMALL, *args, "--plot", tmp_path / "plot.svg")
    assert outcome.exit_code == 0, outcome.output
    for expected in ("speed-up", "useless, sampled, fixed", "useless, sampled, goodput", "mt_bench"):
        assert expected in outcome.stdout
    assert [line.split(":")[0] for line in outcome.stderr.splitlines()] == [
        "useless, sampled, fixed, batch 2",
        "useless, sampled, goodput, batch 2",
    ]
    texts = [element.text for element in Xml.parse(tmp_path / "plot.svg").iter() if element.text]
    assert {"useless, sampled, fixed, batch 2", "useless, sampled, goodput, batch 2"} <= set(texts)


def test_bars_are_as_long_as_the_speedups_they_stand_for() -> None:
    results = [
        {
            "drafters": [f"<{speedup}>"],
            "rule": "sampled",
            "controller": "fixed",
            "batch": 1,
            "all": {"speedup": speedup, "speedup_low": None, "speedup_high": None},
        }
        for speedup in (1.5, 0.5, 3.0)
    ]
    root = Xml.fromstring(svg(results))
    bars = [float(bar.get("width", "")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars == pytest.approx([max(bars), max(bars) / 2, max(bars) / 6], abs=0.1)


def test_the_useless_drafter_is_known_to_this_command_only(model: Path, dataset: Path) -> None:
    assert run(model, "--dataset", dataset, *SMALL, "--drafters", "useles").exit_code == 2
    assert USELESS.name not in DRAFTERS


# --- how long a step takes -------------------------------------------------------------------------------------------


def test_steps_are_timed_for_chains_and_trees_of_all_sizes(model: Path) -> None:
    args = ("--step-times", "--batch", "1,2", "--context", "20", "--runs", "1")
    outcome = run(model, *args, "--json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    for batch in ("1", "2"):
        for shape in ("chain", "tree"):
            assert list(found["step_ms"][batch][shape]) == [str(rows) for rows in ROWS]
            assert min(found["step_ms"][batch][shape].values()) > 0
            assert found["free_rows"][batch][shape] in ROWS
    assert (found["context"], found["runs"]) == (20, 1)
    outcome = run(model, *args)
    assert [line.split()[1] for line in outcome.stdout.splitlines() if "│" in line] == [*map(str, ROWS), "free"]


@pytest.mark.parametrize(("shape", "depth"), [("chain", 12), ("tree", 2)])
def test_a_timed_step_computes_what_a_verification_does(model: Path, shape: str, depth: int) -> None:
    """Requests don't meet, and a row sees its own path only."""
    draft = draft_of(shape, 13)
    assert draft.depths.max() == depth
    runner = ModelRunner.load(model, dtype="float32", device="cpu", num_blocks=6, block_size=16)
    try:
        runner.pool.data.normal_()
        step = verification(runner, draft, 2, 3, 20)
        assert len(set(step.slots)) == 26
        assert step.positions.tolist() == [20, *(20 + draft.depths)] * 2
        tokens = runner.submit(step).result().token_ids
        step.token_ids[12] = (step.token_ids[12] + 1) % 128  # the last row of the first request, which nobody sees
        changed = runner.submit(step).result().token_ids != tokens
        assert not np.delete(changed, 12).any()
    finally:
        runner.shutdown()
        runner.pool.close()


def test_rows_are_free_up_to_the_first_that_are_not() -> None:
    assert free_rows({1: 10.0, 2: 10.9, 3: 11.5, 4: 10.0}) == 2
    assert free_rows({1: 10.0, 2: 12.0}) == 1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--drafters", "useles"], "--drafters: no drafter is called 'useles': did you mean useless?"),
        (["--rules", "chian"], "--rules: drafter useless: no rule is called 'chian': did you mean chain?"),
        (["--controllers", "godput"], "--controllers: no controller is called 'godput': did you mean goodput?"),
        (["--rules", "k_seq"], "--rules: drafter useless: rule k_seq is not lossless for drafts whose law is"),
        (["--drafters", "useless+useless"], "--drafters: useless+useless names a drafter twice"),
        (["--weights", "useless"], "--weights: 'useless' is not NAME=FOLDER"),
        (["--weights", "other=/tmp"], "--weights: other is not among --drafters"),
        (["--weights", "useless=/tmp"], "--weights useless: this drafter takes none"),
        (["--speculation-memory", "much"], "--speculation-memory: 'much' is not a size"),
        (["--speculation-memory", "1K"], "--speculation-memory: 1024 bytes for each drafter hold next to nothing"),
        (["--budget", "9999"], "--budget: 9999 is above what a step has room for: "),
        (["--batch", "1,0"], "--batch: '1,0' is not a list of batch sizes"),
        (["--batch", "9", *SMALL], "--batch: 9 is more than the 8 questions"),
        (["--max-tokens", "256"], "--max-tokens: with 256 no question of"),
        (["--plot", "plot.png"], "--plot: plot.png is no .svg file"),
        (["--plot", "/there/is/none/plot.svg"], "--plot: /there/is/none/plot.svg is no .svg file in a folder"),
        (["--runs", "3"], "--runs has no meaning without --step-times"),
        (["--step-times"], "--dataset has no meaning with --step-times"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_in_one_line(
    model: Path, dataset: Path, args: list[str], message: str
) -> None:
    drafters = [] if "--step-times" in args or "--drafters" in args else ["--drafters", "useless"]
    outcome = run(model, "--dataset", dataset, *drafters, *args)
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"Error: {message}")


def test_several_drafters_need_a_controller_that_chooses(model: Path, dataset: Path, scripted: type[Scripted]) -> None:
    outcome = run(model, "--dataset", dataset, *SMALL, "--drafters", "useless+scripted", "--controllers", "fixed")
    assert outcome.exit_code == 2
    assert "--controllers: fixed does not choose among drafters; give bandit" in outcome.stderr
    args = ("--drafters", "useless+scripted", "--controllers", "bandit", "--batch", "2")
    assert measured(model, dataset, *args)["results"][0]["drafters"] == ["useless", "scripted"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ("\n \n", "holds no question"),
        ('{"turns": ["a"]}\n{"turns": "b"}\n', "line 2: Expected `array`, got `str`"),
        ('{"turns": ["a"]}\n\n{"turn": ["b"]}\n', "line 3: Object missing required field `turns`"),
        ('{"turns": []}\n', "line 1: `turns` is empty"),
        ("turns\n", "line 1: JSON is malformed"),
    ],
)
def test_a_dataset_that_cannot_be_asked_is_refused_by_its_line(
    model: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    outcome = run(model, "--dataset", path, "--drafters", "useless")
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"Error: --dataset: {path}")
    assert message in line


def test_without_a_dataset_there_is_nothing_to_ask(model: Path) -> None:
    outcome = run(model, "--drafters", "useless")
    assert outcome.exit_code == 2
    assert "--dataset: there is nothing to ask" in outcome.stderr


def test_a_context_too_long_for_the_model_is_refused(model: Path) -> None:
    outcome = run(model, "--step-times", "--context", "200")
    assert outcome.exit_code == 2
    assert "--context: 200 is too long for a model of 256 positions; give at most 176" in outcome.stderr


def test_flags_are_refused_without_loading_torch() -> None:
    code = (
        "import sys, click.testing, bench.cli\n"
        "outcome = click.testing.CliRunner().invoke(bench.cli.bench, ['speculation', '--step-times', '--rules', 'x'])\n"
        "sys.exit(outcome.exit_code if 'torch' not in sys.modules else 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 2
