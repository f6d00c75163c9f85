"""Offline training of a head, from prompts to a checkpoint that is measured on prompts it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.errors import ConfigError, ModelError
from core.types import SamplingParams
from engine.checkpoints.progress import Progress
from engine.kv_cache import DTYPES
from engine.model_config import DecoderConfig
from engine.runner import ModelRunner
from engine.vocabulary import Vocabulary
from speculation.heads import checkpoint, training
from speculation.heads.config import HeadConfig, Kind
from speculation.heads.lesson import NO_TOKEN, make_lesson
from speculation.heads.new import Shape, new_config, new_tensors, target_of
from speculation.heads.passages import Passage, write
from speculation.heads.quality import Quality, measure
from speculation.rounds import Needs

TOP = 8
"""The target's likeliest tokens that are kept of each of its laws."""
BATCH = 64
"""Passages that are written at a time: more are no faster on two cores, and half as many are slower."""
HELD_OUT = 0.1
"""Of the prompts."""
MAX_BYTES = 4 << 30
"""That hidden states of the passages may take."""
_GREEDY_SHARPNESS = 2.0
"""Of laws by which greedy passages are learned: between what the target computed and what it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    kind: Kind
    shape: Shape = field(default_factory=Shape)
    start: Path | None = None
    """A head to go on from, whose shape it keeps; None: a new one."""
    max_tokens: int = 128
    """Of a passage's continuation."""
    temperature: float = 0.0
    learning_rate: float = 5e-3
    """As Recipe's."""
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0

    @property
    def sharpness(self) -> float:
        return _GREEDY_SHARPNESS if self.temperature == 0 else 1 / self.temperature

    @property
    def recipe(self) -> training.Recipe:
        return training.Recipe(
            learning_rate=self.learning_rate,
            steps=self.steps,
            seconds=self.seconds,
            seed=self.seed,
            sharpness=self.sharpness,
        )


@dataclass(frozen=True, slots=True)
class Result:
    before: Quality
    after: Quality
    steps: int
    rows: int
    """That were there to be trained on."""
    num_parameters: int
    """That were trained."""


@dataclass(frozen=True, slots=True)
class _Beginning:
    """A head before this training."""

    config: HeadConfig
    layer: dict[str, Any]
    """EAGLE-3's, as in its config.json."""
    tensors: training.Tensors
    token_ids: torch.Tensor


def distil(
    runner: ModelRunner,
    prompts: Sequence[list[int]],
    stop_token_ids: Sequence[int],
    wanted: Distillation,
    out: Path,
    progress: Progress,
) -> Result:
    """Into `out`, a folder that is there and empty, where nothing is written unless the head drafts better after the
    training than before. The target answers where the runner is; heads are trained on the CPU. Raises ConfigError or
    ModelError."""
    vocabulary, target = runner.vocabulary().on_host, _decoder(runner)
    begun = None if wanted.start is None else _read(wanted.start, wanted.kind, target, vocabulary)
    shape = begun.config if begun else new_config(wanted.kind, target, vocabulary.fingerprint, wanted.shape)[0]
    learned, held = _passages(runner, prompts, stop_token_ids, shape, wanted, progress)
    begun = begun or _new(target, vocabulary, wanted, learned)

    frozen = {} if "lm_head.weight" in begun.tensors else {"lm_head.weight": vocabulary.output[begun.token_ids]}
    spread = _spread(learned) if wanted.kind == "eagle3" else None
    trainee = training.Trainee(begun.config, begun.tensors, frozen, spread, DTYPES[runner.layout.dtype])
    ids = torch.full((target.vocab_size,), NO_TOKEN)
    ids[begun.token_ids] = torch.arange(len(begun.token_ids))
    lessons = [make_lesson([passage], ids, wanted.sharpness) for passage in held]

    def quality() -> Quality:
        return measure(trainee.head, lessons, vocabulary.embedding, begun.token_ids, begun.config.depth)

    before = quality()
    progress.begin("Training", 100)
    steps = training.train(
        trainee, learned, ids, vocabulary.embedding, wanted.recipe, lambda done: progress.update(round(100 * done))
    )
    after = quality()
    if after.tau > before.tau:
        checkpoint.save(out, begun.config, trainee.tensors, begun.token_ids, begun.layer)
    rows = sum(passage.num_drawn for passage in learned)
    return Result(before, after, steps, rows, sum(tensor.numel() for tensor in begun.tensors.values()))


def choose_tokens(passages: Sequence[Passage], count: int, vocab_size: int) -> torch.Tensor:
    """[count] ascending: those that the target most expects in the passages; of those that it never does, the lowest
    ids, which byte-pair encodings give to what is frequent."""
    mass = torch.linspace(1e-6, 0, vocab_size, dtype=torch.float64)
    for passage in passages:
        mass.index_add_(0, passage.top_ids.flatten(), passage.top_logprobs.exp().double().flatten())
    return mass.topk(count).indices.sort().values


def _decoder(runner: ModelRunner) -> DecoderConfig:
    if not isinstance(runner.config, DecoderConfig):
        raise ModelError(f"architecture {runner.config.architecture} is run by its class in Transformers: no head fits")
    return runner.config


def _read(folder: Path, kind: Kind, target: DecoderConfig, vocabulary: Vocabulary) -> _Beginning:
    found = checkpoint.load(folder, target_of(target, vocabulary), kind=kind)
    return _Beginning(found.config, checkpoint.layer_of(folder), found.tensors, found.token_ids)


def _new(
    target: DecoderConfig, vocabulary: Vocabulary, wanted: Distillation, passages: Sequence[Passage]
) -> _Beginning:
    config, layer = new_config(wanted.kind, target, vocabulary.fingerprint, wanted.shape)
    token_ids = choose_tokens(passages, config.draft_vocab_size, config.vocab_size)
    tensors = new_tensors(config, vocabulary, token_ids, wanted.seed)
    if wanted.kind == "eagle3":
        tensors["fc.weight"] /= _spread(passages)
    return _Beginning(config, layer, tensors, token_ids)


def _passages(
    runner: ModelRunner,
    prompts: Sequence[list[int]],
    stop_token_ids: Sequence[int],
    head: HeadConfig,
    wanted: Distillation,
    progress: Progress,
) -> tuple[list[Passage], list[Passage]]:
    """To learn from, and held out. No prompt is in both."""
    own = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    if len(own) < 2:
        raise ConfigError("--prompts: there must be two different ones at least, of which one is held out")
    _check_size(runner, own, head, wanted.max_tokens)
    sampling = [
        SamplingParams(
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=wanted.seed * len(own) + index,
            stop_token_ids=tuple(stop_token_ids),
        )
        for index in range(len(own))
    ]
    found: dict[int, Passage] = {}
    progress.begin(f"Writing {len(own)} passages", len(own))
    for index, passage in write(runner, own, sampling, Needs(head.taps, min(TOP, head.vocab_size)), BATCH):
        found[index] = passage
        progress.update(len(found))
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(wanted.seed)).tolist()
    num_held = max(1, round(HELD_OUT * len(own)))
    parts = (order[num_held:], order[:num_held])
    learned, held = ([found[index] for index in part if found[index].num_drawn > 1] for part in parts)
    if not learned or not held:
        raise ConfigError("--prompts: the model ends its answers at once; give other prompts, or raise --max-tokens")
    return learned, held


def _check_size(runner: ModelRunner, prompts: Sequence[list[int]], head: HeadConfig, max_tokens: int) -> None:
    rows = sum(len(prompt) + max_tokens for prompt in prompts)
    nbytes = rows * len(head.taps) * head.hidden_size * DTYPES[runner.layout.dtype].itemsize
    if nbytes > MAX_BYTES:
        raise ConfigError(
            f"--prompts: hidden states of {len(prompts)} passages may take {nbytes >> 20} MiB, and there is room for "
            f"{MAX_BYTES >> 20}; give fewer prompts, or lower --max-tokens"
        )


def _spread(passages: Sequence[Passage]) -> torch.Tensor:
    """[taps * hidden] standard deviations of what EAGLE-3's `fc.weight` reads: some are a hundred times as large as
    others, and one learning rate is to fit all."""
    rows = torch.cat([passage.taps[passage.first :].flatten(1).float() for passage in passages])
    return rows.std(0, correction=0) + 1e-3
