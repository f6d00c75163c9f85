"""Drafters with a head propose what the head was trained to say, and outputs stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError, TransferError
from core.types import SamplingParams
from engine.linear import PlainLinear
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.drafters.eagle3 import IDLE, LAST_NOTED, MOST_NOTED
from speculation.drafters.registry import find_drafter
from speculation.heads.checkpoint import load
from speculation.heads.kinds import make_head
from speculation.heads.lesson import make_lesson
from speculation.heads.new import target_of
from speculation.heads.passages import Passage
from speculation.in_batch import InBatch
from speculation.packing import packed, unpacked
from speculation.rules.registry import RULES
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import TINY, tokens
from tests.engine.late import LateRunner, check_same, engine_over
from tests.speculation.heads.trained import BUDGET, KINDS, made, request, seen, told

EACH = pytest.mark.parametrize("kind", KINDS)
TEXT = tokens(30, seed=3)


@pytest.mark.parametrize("num_blocks", [64, 17])
@EACH
def test_outputs_are_what_they_are_without_it(
    target: ModelRunner, folders: dict[str, Path], kind: str, num_blocks: int
) -> None:
    """Greedy and drawn, and with too few blocks for all."""
    jobs = [
        reproducible.Job(5 + 7 * n, SamplingParams(max_tokens=50, temperature=0.0 if n % 3 else 1.0, seed=n))
        for n in range(6)
    ]
    drafter = made(kind, target, folders[kind])
    speculator = InBatch(
        {kind: drafter},
        {kind: RULES["sampled"]},
        make_controller("fixed", Limits(BUDGET, (kind,))),
        Acceptance(BUDGET),
        vocab_size=TINY["vocab_size"],
        max_budget=BUDGET,
    )
    small = ModelRunner.load(target.folder, dtype="float32", device="cpu", num_blocks=64, block_size=8)
    found = []
    for spec in (None, speculator):
        with engine_over(LateRunner(small, 1), num_blocks=num_blocks, speculator=spec) as harness:
            found.append(harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)]))
    for ours, theirs in zip(*found, strict=True):
        check_same(ours, theirs)
    assert not speculator.counters.switched_off
    ((name, version), counts) = next(iter(speculator.counters.by_drafter.items()))
    assert (name, version) == (kind, drafter.version)
    assert counts.accepted_tokens > 5
    assert drafter.memory_bytes == drafter.weight_bytes  # nothing is kept of requests that have gone


@EACH
def test_a_chain_is_what_the_head_was_trained_to_say(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    """In training it is told the drafted tokens as if they were the text."""
    drafter = made(kind, target, folders[kind], branches=False)
    one = request(0, list(TEXT))
    taps = seen(target, TEXT, drafter.needs.taps)
    told(drafter, one, taps, 0, len(TEXT) - 1)
    drafts = drafter.propose([one], np.array([3]), 0.0)
    assert drafts.num_nodes >= 2
    text = torch.tensor([*TEXT, *drafts.tokens.tolist()])
    rows = torch.stack([taps[tap] for tap in drafter.config.taps], 1)
    rows = torch.cat((rows, torch.zeros(drafts.num_nodes, *rows.shape[1:])))  # of tokens that were not computed
    first, count = len(TEXT) - 2, drafts.num_nodes + 1
    passage = Passage(text, rows, first, torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1))
    lesson = make_lesson([passage], torch.zeros(97, dtype=torch.int64), 1.0)
    shared = target.vocabulary()
    checkpoint = load(folders[kind], target_of(target.config, shared))  # type: ignore[arg-type]
    head = make_head(drafter.config, checkpoint.with_output(shared.output), PlainLinear)
    own = checkpoint.token_ids
    said = [own[logits[0].argmax()].item() for logits in head.rollout(lesson, drafter.embedding, drafts.num_nodes)]
    assert said == drafts.tokens.tolist()


@EACH
def test_what_is_proposed_depends_on_nobody_else(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    """Nor on whether rows were told one by one, between proposals, or at once."""
    texts = [tokens(n, seed=n) for n in (9, 30, 17)]
    together, alone = made(kind, target, folders[kind]), []
    requests = [request(key, text) for key, text in enumerate(texts)]
    for one in requests:
        taps = seen(target, one.token_ids, together.needs.taps)
        told(together, one, taps, 0, len(one.token_ids) - 1)
        single = made(kind, target, folders[kind])
        for end in range(1, len(one.token_ids)):
            told(single, one, taps, end - 1, end)
            if end % 5 == 0:
                part = request(one.key, one.token_ids[: end + 1])
                single.propose([part], np.array([3]), 0.0)
        alone.append(single.propose([one], np.array([BUDGET]), 0.0))
    budgets = np.array([BUDGET, BUDGET, BUDGET])
    for _ in range(2):  # a proposal changes nothing
        drafts = together.propose(requests, budgets, 0.0)
        drafts.validate(TINY["vocab_size"])
        for index, own in enumerate(alone):
            mine = drafts.select([index])
            assert mine.tokens.tolist() == own.tokens.tolist()
            assert mine.parents.tolist() == own.parents.tolist()
            assert mine.confidence == pytest.approx(own.confidence, abs=1e-5)
    drafts = together.propose(requests, np.array([0, 1, 5]), 0.0)
    assert (drafts.lengths <= [0, 1, 5]).all()


@EACH
def test_without_the_last_row_it_has_nothing_to_say(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    drafter, one = made(kind, target, folders[kind]), request(0, list(TEXT))
    taps = seen(target, TEXT, drafter.needs.taps)
    assert drafter.propose([one], np.array([4]), 0.0).num_nodes == 0
    told(drafter, one, taps, 0, len(TEXT) - 2)
    assert drafter.propose([one], np.array([4]), 0.0).num_nodes == 0
    told(drafter, one, taps, len(TEXT) - 2, len(TEXT) - 1)
    assert drafter.propose([one], np.array([4]), 0.0).num_nodes > 0


@EACH
def test_another_worker_goes_on_as_this_one_would(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    here, there = made(kind, target, folders[kind]), made(kind, target, folders[kind])
    one = request(0, list(TEXT))
    told(here, one, seen(target, TEXT, here.needs.taps), 0, len(TEXT) - 1)
    there.unpack(one, unpacked(packed(here.version, here.pack(0))))
    ours, theirs = (side.propose([one], np.array([BUDGET]), 0.0) for side in (here, there))
    assert ours.num_nodes > 0
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert here.pack(7) == {}


def test_eagle_waits_for_the_token_after_a_long_prompt(target: ModelRunner, folders: dict[str, Path]) -> None:
    """More rows than it keeps as they are; of the last the next token has not come."""
    drafter, text = made("eagle3", target, folders["eagle3"]), tokens(300, seed=4)
    one = request(0, text[:-1])
    told(drafter, one, seen(target, text, drafter.needs.taps), 0, len(text) - 1)
    assert not drafter.ready([one])[0]
    one.token_ids.append(text[-1])  # type: ignore[attr-defined]
    assert drafter.propose([one], np.array([4]), 0.0).num_nodes > 0


def test_eagle_computes_nothing_while_no_proposal_is_asked_for(target: ModelRunner, folders: dict[str, Path]) -> None:
    """And goes on, once it is asked, from the last rows that it was told of."""
    drafter, text = made("eagle3", target, folders["eagle3"]), tokens(IDLE + 400, seed=4)
    states = torch.randn((len(text), TINY["hidden_size"]), generator=torch.Generator().manual_seed(0))
    taps = dict.fromkeys(drafter.needs.taps, states)
    first, second = request(0, text), request(1, text)
    told(drafter, first, taps, 0, MOST_NOTED + 1)
    computed = drafter.memory_bytes - drafter.weight_bytes
    assert computed > 0
    for start in range(MOST_NOTED + 1, IDLE + 1, 16):
        told(drafter, first, taps, start, min(start + 16, IDLE + 1))
    drafter.finish(0)
    assert drafter.memory_bytes == drafter.weight_bytes
    told(drafter, second, taps, 0, len(text) - 1)
    assert drafter.memory_bytes == drafter.weight_bytes
    asked = drafter.propose([second], np.array([BUDGET]), 0.0)  # a try
    assert drafter.memory_bytes - drafter.weight_bytes < computed / 2

    fresh, same = made("eagle3", target, folders["eagle3"]), request(0, text)
    told(fresh, same, taps, len(text) - 1 - LAST_NOTED, len(text) - 1)
    assert asked.num_nodes > 0
    assert asked.tokens.tolist() == fresh.propose([same], np.array([BUDGET]), 0.0).tokens.tolist()
    before = drafter.memory_bytes
    for key in range(2, 100):  # is asked for again, at length
        told(drafter, request(key, text), taps, 0, 1)
        drafter.propose([request(key, text[:2])], np.array([1]), 0.0)
        drafter.finish(key)
    told(drafter, request(100, text), taps, 0, MOST_NOTED + 1)
    assert drafter.memory_bytes - before == computed


def test_a_group_shares_its_vocabulary(target: ModelRunner, folders: dict[str, Path]) -> None:
    """And shows the same hidden states, so what is drafted is the same."""
    assert target.folder is not None
    group = GroupRunner.load(
        target.folder, tp_size=2, pp_size=1, dtype="float32", device="cpu", num_blocks=400, block_size=4
    )
    try:
        proposed = []
        for runner in (target, group):
            drafter, one = made("eagle3", runner, folders["eagle3"]), request(0, list(TEXT))
            told(drafter, one, seen(runner, TEXT, drafter.needs.taps), 0, len(TEXT) - 1)
            proposed.append(drafter.propose([one], np.array([BUDGET]), 0.0).tokens.tolist())
    finally:
        group.shutdown()
        group.pool.close()
    assert proposed[0] == proposed[1] != []


@EACH
def test_a_state_of_another_shape_is_refused(target: ModelRunner, folders: dict[str, Path], kind: str) -> None:
    drafter, one = made(kind, target, folders[kind]), request(0, list(TEXT))
    told(drafter, one, seen(target, TEXT, drafter.needs.taps), 0, len(TEXT) - 1)
    state = drafter.pack(0)
    for name in state:
        with pytest.raises(TransferError, match=name):
            drafter.unpack(one, {**state, name: state[name].flatten().repeat(2)})
    with pytest.raises(TransferError, match="text"):
        drafter.unpack(request(1, TEXT[:3]), state)


def test_eagle_goes_on_where_its_memory_ends(target: ModelRunner, folders: dict[str, Path]) -> None:
    """Older rows are forgotten, and no tree is without slots."""
    row = 2 * 2 * TINY["head_dim"] * 4
    whole = made("eagle3", target, folders["eagle3"])
    memory = whole.weight_bytes + row * 2 * (2 * BUDGET + 10)
    drafter = made("eagle3", target, folders["eagle3"], memory=memory, requests=2)
    requests = [request(key, tokens(40, seed=key)) for key in range(2)]
    for one in requests:
        taps = seen(target, list(one.token_ids), drafter.needs.taps)
        for end in range(1, 40):
            told(drafter, one, taps, end - 1, end)
            drafter.propose([request(one.key, list(one.token_ids[: end + 1]))], np.array([BUDGET]), 0.0)
    assert drafter.propose(requests, np.array([BUDGET, BUDGET]), 0.0).num_nodes > 0
    assert drafter.memory_bytes <= memory
    for one in requests:
        drafter.finish(one.key)
    assert drafter.memory_bytes == drafter.weight_bytes
    with pytest.raises(ConfigError, match="speculation-memory"):
        made("eagle3", target, folders["eagle3"], memory=whole.weight_bytes + row, requests=2)


@EACH
def test_a_head_is_a_point_mass_and_needs_weights(target: ModelRunner, kind: str) -> None:
    assert find_drafter(kind).law_for(RULES["sampled"]) == "point_mass"
    with pytest.raises(ConfigError, match="slipstream drafts train"):
        made(kind, target, None)  # type: ignore[arg-type]
