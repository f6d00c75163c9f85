"""What the codecs of a hand-off cost in quality: a model goes on from KV that was encoded and decoded, and from KV that
was not.

For each prompt the model writes greedily from its own KV. Then, for each codec, it is given that output again after the
codec's KV of the prompt (teacher forcing): KL(p || q) in nats of its laws p before and q after, and whether the most
likely token is the same, at every position after the first, which the prefill side draws. And it writes by itself from
the codec's KV: the share of that output that comes before the first token that is another one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.exactness import read_prompts
from bench.prompts import num_equal, spread
from bench.transfer.subject import Subject
from core.errors import ConfigError
from gateway.tokenizer import ServedModel
from kv_transfer.codecs.base import Codec, PieceShape
from kv_transfer.codecs.names import CodecName
from kv_transfer.codecs.registry import CODECS
from kv_transfer.pieces import Extent, cut


@dataclass(slots=True)
class Cost:
    """Of one codec, over all prompts."""

    nbytes: int = 0
    encoded_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    divergences: list[torch.Tensor] = field(default_factory=list)  # [positions] of each prompt
    agreements: list[torch.Tensor] = field(default_factory=list)
    unchanged: int = 0
    num_tokens: int = 0

    def summary(self) -> dict[str, float]:
        return {
            "ratio": self.nbytes / self.encoded_bytes,
            "encode_gb_s": self.nbytes / self.encode_s / 1e9,
            "decode_gb_s": self.nbytes / self.decode_s / 1e9,
            "kl": float(torch.cat(self.divergences).mean()),
            "same_choice": float(torch.cat(self.agreements).mean()),
            "unchanged_tokens": self.unchanged / self.num_tokens,
        }


def measure_quality(
    folder: Path, dataset: Path, num_prompts: int, max_tokens: int, codecs: Sequence[CodecName], **load: Any
) -> dict[str, Any]:
    """The JSON result, but for the model's name. `load`: of ModelRunner.load. Raises ConfigError, ModelError."""
    model = ServedModel.load(folder, ["model"])
    prompts = _prompts(model, dataset, num_prompts, max_tokens)
    subject = Subject(folder, max(map(len, prompts)) + max_tokens, **load)
    costs = {name: Cost() for name in codecs}
    try:
        with torch.inference_mode():
            num_used = sum(_compare(subject, prompt, max_tokens, model.eos_token_ids, costs) for prompt in prompts)
    finally:
        subject.close()
    if not num_used:
        raise ConfigError("--dataset-path: the model ends every answer with its first token; take other prompts")
    return {
        "dtype": subject.layout.dtype,
        "device": str(subject.device),
        "prompts": num_used,
        "positions": next(iter(costs.values())).num_tokens,
        "codecs": {name: cost.summary() for name, cost in costs.items()},
    }


def _prompts(model: ServedModel, dataset: Path, num_prompts: int, max_tokens: int) -> list[list[int]]:
    """Evenly spread over those of the file that leave room for the output."""
    fit: list[list[int]] = []
    for text in read_prompts(dataset, sys.maxsize):
        token_ids = model.question_ids(text)
        if 0 < len(token_ids) <= model.max_model_len - max_tokens:
            fit.append(token_ids)
    if not fit:
        raise ConfigError(
            f"--max-tokens: with {max_tokens} no prompt of {dataset} fits the model's {model.max_model_len}; lower it"
        )
    return spread(fit, num_prompts)


def _compare(
    subject: Subject, prompt: list[int], max_tokens: int, stop: Sequence[int], costs: dict[CodecName, Cost]
) -> bool:
    """Add one prompt to `costs`. False if its output is a single token, which owes nothing to the KV handed over."""
    first, length = subject.prefill(prompt), len(prompt)
    kv = subject.take(length)
    output = subject.generate(first, length, max_tokens, stop)
    if len(output) == 1:
        return False
    before = subject.extend(output[:-1], length)
    for name, cost in costs.items():
        subject.put(_through(CODECS[name], subject, kv, cost))
        after = subject.extend(output[:-1], length)
        cost.divergences.append(_divergence(before, after))
        cost.agreements.append((before.argmax(-1) == after.argmax(-1)).float())
        written = subject.generate(first, length, max_tokens, stop)
        cost.unchanged += num_equal(output, written) - 1
        cost.num_tokens += len(output) - 1
    return True


def _through(codec: Codec, subject: Subject, kv: torch.Tensor, cost: Cost) -> torch.Tensor:
    """What comes out at the other end, in the pieces of a hand-off."""
    taken = torch.empty_like(kv)
    for piece in cut(subject.layout, Extent(0, kv.shape[2], 0, kv.shape[0])):
        layers = slice(piece.layer, piece.layer + piece.num_layers)
        tokens = slice(piece.token, piece.token + piece.num_tokens)
        given = kv[layers, :, tokens]
        shape = PieceShape.of(given)
        with _one_thread():
            frame, encode_s = _timed(lambda: codec.encode(given), subject.device)  # noqa: B023  called at once
            decoded, decode_s = _timed(lambda: codec.decode(frame, shape), subject.device)  # noqa: B023
        taken[layers, :, tokens] = decoded
        cost.nbytes += shape.nbytes
        cost.encoded_bytes += frame.numel()
        cost.encode_s += encode_s
        cost.decode_s += decode_s
    return taken


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timed(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """On the CPU seconds of processor time, which others who compute here don't add to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize(device)
        return result, time.perf_counter() - started
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[positions] of KL(p || q) = sum p (log p - log q), never below 0 by a rounding."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min_(0)
