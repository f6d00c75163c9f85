"""The model as the gateway knows it: names, lengths, vocabulary, tokenizer and chat template.

A folder with tokenizer.json is read without importing torch (a second and 190 MB saved). Other folders go through
AutoTokenizer, which converts what it knows and imports torch to do so.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jinja2
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from core.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ModelError, UnknownModel
from gateway.lengths import BYTE_LEVEL_ALPHABET, TokenLength, token_length
from gateway.text import Detokenizer

P = ParamSpec("P")
R = TypeVar("R")

INLINE_CHARS = 4000
"""Text up to this size is tokenized on the event loop (under 2 ms); longer text in a thread."""
MESSAGE_CHARS = 40
"""A message counts as this many characters beside its own: rendering one takes about as long."""

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


async def inline_or_thread(size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """work(*args, **kwargs), in a thread if `size` characters are many."""
    if size <= INLINE_CHARS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


@dataclass(frozen=True)
class ServedModel:
    """`names` are what clients may ask for, the first being the one we answer with when they name none.
    `eos_token_ids` end an output; `defaults` is the part of generation_config.json that sets sampling."""

    names: tuple[str, ...]
    tokenizer: TokenizersBackend
    max_model_len: int
    vocab_size: int
    """Rows of the embedding: token ids from clients must be below it."""
    eos_token_ids: tuple[int, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters of it that clients may ask for in its place: where each comes from, by name."""
    adapter_bases: Mapping[str, str] = field(default_factory=dict)
    """Of adapters that are listed under a model of another name than our first: that name."""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        names: Sequence[str],
        max_model_len: int | None = None,
        adapters: Mapping[str, str] | None = None,
        adapter_bases: Mapping[str, str] | None = None,
    ) -> ServedModel:
        """Read a Hugging Face folder. Raises ModelError for what cannot be read, ConfigError for a `max_model_len`
        the model was not made for."""
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config", config)
        generation = _read_json(folder / "generation_config.json", missing_ok=True)
        tokenizer = _load_tokenizer(folder)
        eos = generation.get("eos_token_id", text_config.get("eos_token_id", config.get("eos_token_id")))
        ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        vocab_size = int(text_config.get("vocab_size", len(tokenizer)))
        return cls(
            names=tuple(names),
            tokenizer=tokenizer,
            max_model_len=_context_length(text_config, max_model_len, folder),
            vocab_size=vocab_size,
            eos_token_ids=tuple(sorted(i for i in ids if 0 <= i < vocab_size)),  # others are never drawn
            defaults={name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None},
            adapters=adapters or {},
            adapter_bases=adapter_bases or {},
        )

    def check_name(self, name: str | None) -> str:
        """The name to answer with. Raises UnknownModel."""
        if name is None:
            return self.names[0]
        known = (*self.names, *self.adapters)
        if name not in known:
            raise UnknownModel(
                f"model {name!r} is not served here; this server has {', '.join(map(repr, known))}", param="model"
            )
        return name

    def adapter_of(self, name: str | None) -> str:
        """The adapter that `name`, as a client gave it, asks for; "" is none."""
        return name if name is not None and name in self.adapters else ""

    # --- text to tokens --------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # A batch, because it releases the GIL for all of the work; fast, because nobody needs the offsets.
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_prompt(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises ContextLengthExceeded, before any work, for text that can't fit the context however it is cut, and
        InvalidRequest for text with a token that the model has no embedding of."""
        fewest = self.token_length.fewest_tokens(text) if self.token_length is not None else 0
        if fewest > self.max_model_len:
            raise ContextLengthExceeded(
                f"this model's context is {self.max_model_len} tokens, but the prompt has {len(text)} characters, "
                f"which are {fewest} tokens at least; shorten it",
                param=param,
            )
        token_ids = self.encode(text, add_special_tokens=add_special_tokens)
        if max(token_ids, default=0) >= self.vocab_size:  # some tokenizers have added tokens that the model has not
            token = self.backend.id_to_token(max(token_ids))
            raise InvalidRequest(
                f"{param}: the text holds {token!r}, which is a token of the tokenizer's, but none of the model's "
                f"{self.vocab_size}; leave it out",
                param=param,
            )
        return token_ids

    def render_chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, template_kwargs: Mapping[str, Any]
    ) -> str:
        """The prompt text of a conversation. Raises InvalidRequest if the model has no chat template, or if the
        template refuses the messages."""
        if self.tokenizer.chat_template is None:
            raise InvalidRequest(
                f"model {self.names[0]!r} has no chat template; use /v1/completions with a prompt of your own",
                param="messages",
            )
        if reserved := sorted(template_kwargs.keys() & _RESERVED_TEMPLATE_KWARGS):
            raise InvalidRequest(f"{reserved[0]!r} cannot be set", param=f"chat_template_kwargs.{reserved[0]}")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refused the messages: {reason}", param="messages"
            ) from error
        return text

    def question_ids(self, text: str) -> list[int]:
        """A user's first message as the model sees it: by its chat template, if it has one."""
        if self.tokenizer.chat_template is None:
            return self.encode(text)
        rendered = self.render_chat([{"role": "user", "content": text}], template_kwargs={})
        return self.encode(rendered, add_special_tokens=False)

    # --- tokens to text --------------------------------------------------------------------------------------------

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self.backend, self._special_token_ids if skip_special_tokens else frozenset())

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]
        return text

    def token_text(self, token_id: int) -> str:
        """One token by itself; U+FFFD for part of a character."""
        return self._describe(token_id)[0]

    def token_bytes(self, token_id: int) -> list[int]:
        """The token's bytes; those of a character that spans several tokens are split among them."""
        return self._describe(token_id)[1]

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer proper. Encoding is safe from several threads."""
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self.backend.to_str()
        return text

    @cached_property
    def token_length(self) -> TokenLength | None:
        return token_length(self.backend)

    @cached_property
    def _special_token_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _describe(self) -> Callable[[int], tuple[str, list[int]]]:
        backend = self.backend
        byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        added = backend.get_added_tokens_decoder()

        @lru_cache(maxsize=65536)
        def describe(token_id: int) -> tuple[str, list[int]]:
            text = backend.decode([token_id], skip_special_tokens=False)
            token = backend.id_to_token(token_id) or ""
            if byte_level and token_id not in added:
                return text, [BYTE_LEVEL_ALPHABET[c] for c in token]
            if len(token) == 6 and token.startswith("<0x"):
                return text, [int(token[3:5], 16)]  # SentencePiece's byte fallback
            return text, list(text.encode())

        return describe


_RESERVED_TEMPLATE_KWARGS = {
    "messages",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
}


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing_ok:
            return {}
        raise ModelError(f"{path} does not exist; give the folder of a Hugging Face model") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"cannot read {path}: it does not hold a JSON object")
    return value


def _load_tokenizer(folder: Path) -> TokenizersBackend:
    try:
        if (folder / "tokenizer.json").exists():
            return TokenizersBackend.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # imports torch

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer in {folder}: {' '.join(str(error).split())}") from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise ModelError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) cannot be converted to tokenizer.json"
        )
    return tokenizer


def _context_length(config: Mapping[str, Any], wanted: int | None, folder: Path) -> int:
    longest: int | None = config.get("max_position_embeddings")
    if wanted is None:
        if longest is None:
            raise ModelError(f"{folder / 'config.json'} has no max_position_embeddings; set max_model_len")
        return longest
    if longest is not None and wanted > longest:
        raise ConfigError(
            f"max_model_len {wanted} is above the model's {longest} (max_position_embeddings); lower it",
            param="max_model_len",
        )
    return wanted
