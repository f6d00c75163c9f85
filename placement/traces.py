"""Traces of real traffic, in the formats of Azure's (CSV) and Mooncake's (JSON lines) public ones, and the log of
requests that we have served (JSON lines of core.served.Served).

Every error is a ConfigError that names the file and the line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from core.errors import ConfigError
from core.served import Served
from placement.arrivals import fixed_gaps
from placement.prefixes import prefix_hits
from placement.workload import Times, Workload

T = TypeVar("T")

AZURE_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
HASHED_TOKENS = 512
"""Tokens of a prompt for which a line of Mooncake's trace has one hash."""

MOST_TOKENS = 10**9 + 1


@dataclass(frozen=True)
class Trace:
    """Requests as they were seen, and how many came per second on average."""

    workload: Workload
    rate: float


class _Row(msgspec.Struct):
    """`at` in the unit of the file, from any origin. `cached` is known, or follows from `prefix`."""

    at: float
    prompt: int
    output: int
    prefix: tuple[int, ...] = ()
    cached: int = 0


_Reader = Callable[[Path, str], Iterator[tuple[int, _Row]]]


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, *, cache_tokens: float = float("inf")) -> Trace:
    """The trace in `path`: `.csv` is Azure's format, `.jsonl` Mooncake's, or our own log's if its first line has
    `arrived_s`. Prompts that begin like earlier ones hit a prefix cache of `cache_tokens` tokens; our log knows what
    they hit."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{path}: a trace is a .csv (Azure) or a .jsonl (Mooncake, or our log) file", param="trace")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", param="trace") from error
    read, units_per_s = _format(path.suffix, text)
    return _trace(path, list(_checked(path, read(path, text))), units_per_s, cache_tokens)


def served_lines(served: Iterable[Served]) -> bytes:
    """What is appended to a log that `read_trace` reads: a line for each request, in any order."""
    return b"".join(msgspec.json.encode(one) + b"\n" for one in served)


def served_workload(served: Iterable[Served]) -> Workload:
    """Those that got a token, in the order given and evenly spaced. Raises ConfigError if there is none."""
    rows = [*_rows(served)]
    return _workload(rows, fixed_gaps(len(rows)))


def _rows(served: Iterable[Served]) -> Iterator[_Row]:
    for one in served:
        if one.output_tokens != 0:
            yield _Row(one.arrived_s, one.prompt_tokens, one.output_tokens, cached=one.cached_tokens)


def _format(suffix: str, text: str) -> tuple[_Reader, float]:
    """How it is read, and units of its times in a second."""
    if suffix == ".csv":
        return _azure, 1.0
    first = next((line for line in text.splitlines() if line.strip()), "")
    return (_log, 1.0) if '"arrived_s"' in first else (_mooncake, 1000.0)


def _azure_row(row: list[str]) -> _Row:
    """Raises ValueError for what is no request."""
    try:
        at, prompt, output = row
        return _Row(float(at), int(prompt), int(output))
    except ValueError:
        raise ValueError(f"{','.join(row)!r} is not a time in seconds and two counts of tokens") from None


def _azure(path: Path, text: str) -> Iterator[tuple[int, _Row]]:
    rows = csv.reader(StringIO(text))
    try:
        if tuple(next(rows, ())) != AZURE_COLUMNS:
            raise ConfigError(f"{path}, line 1: expected the columns {','.join(AZURE_COLUMNS)}", param="trace")
        for row in rows:
            if row:
                yield rows.line_num, _azure_row(row)
    except (ValueError, csv.Error) as error:
        raise _bad_line(path, rows.line_num, error) from error


def _mooncake(path: Path, text: str) -> Iterator[tuple[int, _Row]]:
    for number, found in _decoded(path, text, _MooncakeLine):
        yield number, _Row(found.timestamp, found.input_length, found.output_length, found.hash_ids)


def _log(path: Path, text: str) -> Iterator[tuple[int, _Row]]:
    """In the order of arrival, without those that got no token: of these no length is known."""
    served = [(number, row) for number, one in _decoded(path, text, Served) for row in _rows([one])]
    yield from sorted(served, key=lambda line: line[1].at)


def _decoded(path: Path, text: str, line_type: type[T]) -> Iterator[tuple[int, T]]:
    decode = msgspec.json.Decoder(line_type).decode
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, decode(line)
        except ValueError as error:
            raise _bad_line(path, number, error) from error


def _checked(path: Path, rows: Iterable[tuple[int, _Row]]) -> Iterator[_Row]:
    before = -np.inf
    for number, row in rows:
        if not (1 <= row.prompt < MOST_TOKENS and 1 <= row.output < MOST_TOKENS):
            tokens = f"{row.prompt} prompt and {row.output} output tokens"
            raise _bad_line(path, number, f"{tokens}: each is 1 to a billion")
        if not 0 <= row.cached <= row.prompt:
            raise _bad_line(path, number, f"{row.cached} of {row.prompt} prompt tokens cached")
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
    return Trace(_workload(rows, gaps * rate, cache_tokens), rate)


def _workload(rows: list[_Row], gaps: Times, cache_tokens: float = float("inf")) -> Workload:
    prompts = np.array([row.prompt for row in rows], np.int32)
    hits = prefix_hits([row.prefix for row in rows], HASHED_TOKENS, cache_tokens)
    hits = np.maximum(hits, [row.cached for row in rows])
    cached = np.minimum(hits, prompts - 1)  # the last token is always computed: its logits give the first output token
    return Workload(prompts, np.array([row.output for row in rows], np.int32), gaps, cached.astype(np.int32))


def _bad_line(path: Path, number: int, what: object) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}", param="trace")
