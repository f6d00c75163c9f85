"""Engines over a model that is a table: the logits after a token depend on it and on its position, and on nothing else.

The tokenizer is a small byte-level BPE, and the model has more logits than it has tokens, as padded models do.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.types import Finish, Grammar, Request, SamplingParams
from engine.block_manager import BlockManager
from engine.engine import Engine, Report
from engine.sampler import sample
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence
from engine.step import StepBatch, StepOutput
from engine.structured.grammars import Grammars

WAIT_S = 60
PADDING = 13
CORPUS = [
    '{"name": "the quick brown fox", "age": 12, "tags": ["a", "b"], "ok": true, "more": null} yes no maybe 3.14'
] * 4


def save_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class TableRunner:
    def __init__(self, vocab_size: int) -> None:
        self._table = torch.randn(512, vocab_size, generator=torch.Generator().manual_seed(3)) * 3

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        rows = batch.logit_rows
        logits = self._table[torch.from_numpy((batch.token_ids[rows] * 31 + batch.positions[rows] * 7) % 512)]
        tokens, logprobs = sample(logits, batch.sampling)
        future: Future[StepOutput] = Future()
        future.set_result(StepOutput(token_ids=tokens, logprobs=logprobs))
        return future

    def shutdown(self) -> None:
        pass


@dataclass
class Output:
    token_ids: list[int]
    finish: Finish


class Running:
    """An engine and what it reports."""

    def __init__(self, engine: Engine, reports: queue.Queue[Report]) -> None:
        self.engine = engine
        self.reports = reports

    def outputs(self, *request_ids: str) -> dict[str, Output]:
        """Waits until all of them have ended."""
        tokens: dict[str, list[int]] = {name: [] for name in request_ids}
        ended: dict[str, Output] = {}
        while len(ended) < len(request_ids):
            for update in self.reports.get(timeout=WAIT_S).updates:
                name = update.sequence.request_id
                tokens[name] += update.token_ids
                if update.finish is not None:
                    ended[name] = Output(tokens[name], update.finish)
        return ended

    def run(self, *requests: Request) -> list[Output]:
        for request in requests:
            self.engine.add(Sequence(request))
        ended = self.outputs(*[request.request_id for request in requests])
        return [ended[request.request_id] for request in requests]


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id("<|end|>")
        self.vocab_size = self.tokenizer.get_vocab_size() + PADDING
        self.runner = TableRunner(self.vocab_size)

    @contextmanager
    def engine(
        self, *, tokens: int = 64, blocks: int = 512, seqs: int = 32, folder: Path | None = None
    ) -> Iterator[Running]:
        """`tokens` per step, a cache of `blocks` blocks of four."""
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=512)
        reports: queue.Queue[Report] = queue.Queue()
        scheduler = Scheduler(config, BlockManager(num_blocks=blocks, block_size=4))
        engine = Engine(self.runner, scheduler, reports.put, Grammars(folder or self.folder, self.vocab_size))
        engine.start()
        try:
            yield Running(engine, reports)
            assert engine.stats.num_running == 0
        finally:
            engine.stop()

    def request(
        self,
        name: str,
        grammar: Grammar | None = None,
        prompt: int = 5,
        emitted: list[int] | None = None,
        **sampling: Any,
    ) -> Request:
        settings = {"max_tokens": 200, "stop_token_ids": (self.end,), "seed": sum(name.encode()), "grammar": grammar}
        return Request(
            request_id=name,
            prompt_token_ids=[(7 * i + len(name)) % 250 for i in range(prompt)],
            sampling=SamplingParams(**(settings | sampling)),
            deadline=0.0,
            emitted_token_ids=emitted or [],
        )

    def text(self, output: Output) -> str:
        """What a client sees: a stop token that ended it is not part of it."""
        stopped = output.finish.stop_token_id is not None
        token_ids = output.token_ids[:-1] if stopped else output.token_ids
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
