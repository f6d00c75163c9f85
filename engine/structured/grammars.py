"""The grammars of one worker. Compiling takes a millisecond, or a second, so it is done beside the engine's loop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from llguidance import LLMatcher

from core.errors import InvalidRequest
from core.grammar import Vocabulary, compile_grammar
from core.types import Grammar
from engine.sequence import Sequence
from engine.structured.constraint import Constraint

MAX_COMPILED = 32
"""Grammars kept, the least recently used one being dropped: some 100 KB each, and 10 MB when its lexer is full."""


class Grammars:
    """The vocabulary is read from the model's folder when the first grammar comes: most workers never see one."""

    def __init__(self, folder: Path, vocab_size: int, max_compiled: int = MAX_COMPILED) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._max_compiled = max_compiled
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def constrain(self, sequence: Sequence) -> Future[Constraint]:
        """What follows the output tokens that a sequence has, by its grammar. The future ends with InvalidRequest if
        the grammar can't be compiled here."""
        sampling = sequence.request.sampling
        assert sampling.grammar is not None
        emitted = sequence.output_token_ids
        return self._thread.submit(self._constrain, sampling.grammar, sampling.stop_token_ids, emitted)

    def close(self) -> None:
        """Nothing is compiled any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _constrain(self, grammar: Grammar, stop_token_ids: tuple[int, ...], emitted: list[int]) -> Constraint:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.load(_tokenizer_json(self._folder), self._vocab_size)
        matcher = self._compile(grammar, self._vocabulary)
        renew = partial(self._compile, grammar, self._vocabulary, afresh=True)
        constraint = Constraint(matcher, self._vocabulary, stop_token_ids, renew)
        constraint.advance(emitted)
        return constraint

    def _compile(self, grammar: Grammar, vocabulary: Vocabulary, afresh: bool = False) -> LLMatcher:
        with self._lock:
            matcher = None if afresh else self._compiled.get(grammar)
        if matcher is None:
            matcher = compile_grammar(grammar, vocabulary)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()


def _tokenizer_json(folder: Path) -> str:
    """Raises InvalidRequest for a model whose tokenizer is in another format."""
    try:
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            "this model has no tokenizer.json, without which a grammar can't be followed; ask without one"
        ) from error
