"""Training of heads on passages: the cross-entropy of the target's law at every depth of a rollout.

The law is what the target computed when it wrote the passage: nothing is computed again. All arithmetic is in the dtype
that the head will be served in, on master weights of float32, so that what is measured is what is served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from engine.linear import PlainLinear
from speculation.heads.config import HeadConfig
from speculation.heads.kinds import Head, make_head
from speculation.heads.lesson import Lesson, make_lesson
from speculation.heads.passages import Passage

FADING = 0.8
"""Of the weight of each depth, as in EAGLE-3."""
WARM_UP = 0.05
"""Part of the training in which the learning rate rises."""
COOLED = 0.05
"""Of the highest learning rate, at the end."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    learning_rate: float = 5e-3
    """Of matrices inside of the head, which Muon learns; AdamW learns the rest at a tenth of it."""
    rows: int = 2048
    """Of the texts, in a step; whole passages, so about so many, and at most as many as there are. What Muon takes for
    a step does not depend on them: of 512 that would be a third of all the time."""
    steps: int | None = None
    """One of the two bounds must be set, and the first that is reached ends the training."""
    seconds: float | None = None
    seed: int = 0
    sharpness: float = 2.0
    """The power that laws are raised to: that of a greedy text is nearer to its likeliest token."""


class Trainee:
    """A head whose tensors are being learned; those of `frozen` are not."""

    def __init__(
        self, config: HeadConfig, tensors: Tensors, frozen: Tensors, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """`scales` [taps * hidden]: of what `fc.weight` reads, so that one learning rate fits all of it."""
        self.config = config
        self._scales = scales
        self._dtype = dtype
        self._frozen = {name: tensor.to(dtype) for name, tensor in frozen.items()}
        self.masters = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        if scales is not None:
            self.masters["fc.weight"] *= scales
        for master in self.masters.values():
            master.requires_grad_()

    @property
    def tensors(self) -> Tensors:
        """As they are served."""
        found = dict(self.masters)
        if self._scales is not None:
            found["fc.weight"] = found["fc.weight"] / self._scales
        return {name: tensor.to(self._dtype) for name, tensor in found.items()}

    @property
    def head(self) -> Head:
        return make_head(self.config, self.tensors | self._frozen, PlainLinear)


def train(
    trainee: Trainee,
    passages: Sequence[Passage],
    ids: torch.Tensor,
    embedding: torch.Tensor,
    recipe: Recipe,
    on_progress: Callable[[float], None],
) -> int:
    """The number of steps; `on_progress` is told what part is done. `ids` as for make_lesson. The same seed and number
    of steps give the same head; a bound in seconds does not. Heads learn to look further ahead as the training goes on:
    depths that begin where the first token is still wrong have little to learn."""
    masters = list(trainee.masters.values())
    optimizers = _optimizers(trainee, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    rows = min(recipe.rows, sum(passage.num_drawn for passage in passages))
    started, step, left = time.monotonic(), 0, []  # type: float, int, list[int]
    while (done := _part_done(recipe, step, started)) < 1.0:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * _rate(done)
        batch: list[Passage] = []
        while sum(passage.num_drawn for passage in batch) < rows:
            left = left or torch.randperm(len(passages), generator=generator).tolist()
            batch.append(passages[left.pop()])
        lesson = make_lesson(batch, ids, recipe.sharpness)
        depth = min(trainee.config.depth, 1 + int(done * (trainee.config.depth + 1)))
        loss = _loss(trainee.head, lesson, embedding, depth)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        on_progress(_part_done(recipe, step, started))
    return step


def _optimizers(trainee: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the rest."""
    inner = {n: t for n, t in trainee.masters.items() if t.dim() == 2 and n != "lm_head.weight"}
    outer = [tensor for name, tensor in trainee.masters.items() if name not in inner]
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(list(inner.values()), recipe.learning_rate, adjust_lr_fn="match_rms_adamw", weight_decay=0.01),
        torch.optim.AdamW(outer, recipe.learning_rate / 10, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial"] = group["lr"]
    return found


def _part_done(recipe: Recipe, step: int, started: float) -> float:
    by_steps = 0.0 if recipe.steps is None else step / recipe.steps
    by_time = 0.0 if recipe.seconds is None else (time.monotonic() - started) / recipe.seconds
    return max(by_steps, by_time)


def _rate(done: float) -> float:
    return min(1.0, done / WARM_UP + 0.01) * (COOLED + (1 - COOLED) * (1 + math.cos(math.pi * done)) / 2)


def _loss(head: Head, lesson: Lesson, embedding: torch.Tensor, depth: int) -> torch.Tensor:
    total = torch.zeros(())
    for step, logits in enumerate(head.rollout(lesson, embedding, depth)):
        ids, laws = lesson.law(step)
        weights = laws * (lesson.there(step)[:, None] & (ids >= 0))
        surprise = -F.log_softmax(logits.float(), -1).gather(1, ids.clamp(min=0))
        total = total + FADING**step * (weights * surprise).sum() / len(lesson.rows)
    return total
