"""Grammars over the tokens of one model, by llguidance: what the gateway vets and a worker follows is the same thing.

llguidance runs a lexer over regular-expression derivatives and an Earley parser over its lexemes, and computes from
them which tokens can come next. It needs the bytes of every token, which it reads off a tokenizer.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from core.errors import InvalidRequest
from core.types import Grammar, GrammarKind

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the tokens of JSON. Without an end to it, a model that likes blanks would never get to the next token."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,  # about 10 ms
    step_lexer_fuel=100_000,  # about 7 ms
    step_max_items=25_000,
    max_lexer_states=20_000,  # some 10 MB
    verbose_errors=False,
)
_ASCII = "dw"  # as in JavaScript and JSON Schema, the classes d and w are of ASCII
_END = "<|end of the grammar|>"
_VETTED_TOKENS = 16


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model. `size` is the number of its logits, which may be more than the tokenizer has tokens."""

    tokenizer: LLTokenizer
    size: int
    end_id: int
    """A token of our own, without text: it is allowed where a text may end. The model has nothing like it."""

    @classmethod
    def load(cls, tokenizer_json: str, size: int) -> Vocabulary:
        """Takes some tenths of a second. Raises InvalidRequest if grammars can't be followed in these tokens."""
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.add_special_tokens([AddedToken(_END, special=True)])
            end_id = tokenizer.token_to_id(_END)
            if end_id is None or max(tokenizer.get_vocab().values()) > end_id:
                raise ValueError("its token ids have gaps")
            wrapped = LLTokenizer(tokenizer.to_str(), n_vocab=max(size, end_id + 1), eos_token=end_id)
        except Exception as error:  # tokenizers raises Exception itself
            raise InvalidRequest(
                f"this model's tokenizer can't be used with a grammar ({_one_line(str(error))}); ask without one"
            ) from error
        return cls(wrapped, size, end_id)

    @cached_property
    def drawable(self) -> NDArray[np.uint32]:
        """[ceil(size / 32)] with the bits of all tokens but the end set."""
        return self.words([i for i in range(self.size) if i != self.end_id])

    def words(self, token_ids: list[int]) -> NDArray[np.uint32]:
        """[ceil(size / 32)] with the bits of these tokens set; ids outside of the vocabulary are left out."""
        bits = np.zeros(-(-self.size // 32) * 32, np.uint8)
        bits[[i for i in token_ids if 0 <= i < self.size]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher at the start of the text. Its copies share what their lexer has learned. Raises InvalidRequest."""
    try:
        matcher = LLMatcher(vocabulary.tokenizer, _source(grammar), log_level=0, limits=_LIMITS)
    except ValueError as error:
        raise InvalidRequest(_one_line(str(error))) from error
    if matcher.is_error():
        raise InvalidRequest(_one_line(matcher.get_error()))
    return matcher


def vet(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Compile the grammar and follow it for some tokens. Raises InvalidRequest if it can't be compiled, is too costly
    or no text, or only the empty one, satisfies it."""
    matcher = compile_grammar(grammar, vocabulary)
    for step in range(_VETTED_TOKENS):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        token_ids = np.unpackbits(mask, bitorder="little").nonzero()[0]
        texts = token_ids[token_ids < vocabulary.end_id]
        if not len(texts) and step == 0:
            empty = matcher.is_accepting() and not matcher.is_error()
            raise InvalidRequest("only the empty text satisfies it" if empty else "no text satisfies it")
        if matcher.is_error() or (len(texts) and not matcher.consume_token(int(texts[len(texts) // 2]))):
            raise InvalidRequest(f"it is too costly to follow ({describe(matcher)})")
        if not len(texts) or matcher.is_stopped():
            return


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, _ASCII)}/")
        case GrammarKind.EBNF:
            return grammar_from("ebnf", grammar.text)


def describe(matcher: LLMatcher) -> str:
    """Why a matcher has failed, in one line."""
    return _one_line(matcher.get_error())


def _one_line(message: str) -> str:
    """Without the excerpts of the source that llguidance draws under its messages."""
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d*\s*\||\^|<non-verbose/>)", line)]
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= 300 else text[:297] + "..."
