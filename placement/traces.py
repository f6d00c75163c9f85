"""Traces of real traffic, in the formats of Azure's (CSV) and Mooncake's (JSON lines) public ones.

Every error is a ConfigError that names the file and the line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np

from core.errors import ConfigError
from placement.prefixes import prefix_hits
from placement.workload import Workload

AZURE_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
HASHED_TOKENS = 512
"""Tokens of a prompt for which a line of Mooncake's trace has one hash."""


@dataclass(frozen=True)
class Trace:
    """Requests as they were seen, and how many came per second on average."""

    workload: Workload
    rate: float


class _Row(msgspec.Struct):
    """`at` in the unit of the file, from any origin."""

    at: float
    prompt: int
    output: int
    prefix: tuple[int, ...] = ()


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, *, cache_tokens: float = float("inf")) -> Trace:
    """The trace in `path`: `.csv` is Azure's format, `.jsonl` Mooncake's. Prompts that begin like earlier ones hit a
    prefix cache of `cache_tokens` tokens."""
    formats = {".csv": (_azure, 1.0), ".jsonl": (_mooncake, 1000.0)}
    if path.suffix not in formats:
        raise ConfigError(f"{path}: a trace is a .csv (Azure) or a .jsonl (Mooncake) file", param="trace")
    read, units_per_s = formats[path.suffix]
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", param="trace") from error
    return _trace(path, list(_checked(path, read(path, text))), units_per_s, cache_tokens)


def _azure(path: Path, text: str) -> Iterator[tuple[int, _Row]]:
    rows = csv.reader(StringIO(text))
    header = tuple(next(rows, ()))
    if header != AZURE_COLUMNS:
        raise ConfigError(f"{path}, line 1: expected the columns {','.join(AZURE_COLUMNS)}", param="trace")
    for row in rows:
        if not row:
            continue
        try:
            at, prompt, output = row
            yield rows.line_num, _Row(float(at), int(prompt), int(output))
        except ValueError as error:
            raise _bad_line(path, rows.line_num, error) from error


def _mooncake(path: Path, text: str) -> Iterator[tuple[int, _Row]]:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = decode(line)
        except ValueError as error:
            raise _bad_line(path, number, error) from error
        yield number, _Row(found.timestamp, found.input_length, found.output_length, found.hash_ids)


def _checked(path: Path, rows: Iterable[tuple[int, _Row]]) -> Iterator[_Row]:
    before = -np.inf
    for number, row in rows:
        if row.prompt < 1 or row.output < 1:
            raise _bad_line(path, number, f"{row.prompt} prompt and {row.output} output tokens: both must be 1 or more")
        if not before <= row.at < np.inf:
            raise _bad_line(path, number, f"arrives at {row.at:g}, but the line before it at {before:g}")
        before = row.at
        yield row


def _trace(path: Path, rows: list[_Row], units_per_s: float, cache_tokens: float) -> Trace:
    if not rows:
        raise ConfigError(f"{path} is an empty trace: it has no request", param="trace")
    seconds = np.array([row.at for row in rows]) / units_per_s
    gaps = np.diff(seconds, prepend=seconds[0])
    if not gaps.any():
        raise ConfigError(f"{path}: all {len(rows)} requests arrive at once, which tells no rate", param="trace")
    rate = float((len(rows) - 1) / (seconds[-1] - seconds[0]))
    prompts = np.array([row.prompt for row in rows], np.int32)
    hits = prefix_hits([row.prefix for row in rows], HASHED_TOKENS, cache_tokens)
    cached = np.minimum(hits, prompts - 1)  # the last token is always computed: its logits give the first output token
    return Trace(Workload(prompts, np.array([row.output for row in rows], np.int32), gaps * rate, cached), rate)


def _bad_line(path: Path, number: int, what: object) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}", param="trace")
