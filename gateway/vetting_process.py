"""The process that vets grammars: one line of JSON in for each, one line out. It ends when its input does, or when a
grammar takes more than it may: that ends the process, and the one who asked sees how."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from pathlib import Path

import msgspec

from core.errors import InvalidRequest
from core.grammar import Vocabulary, vet
from core.types import Grammar

CPU_SECONDS = 2.0
"""For one grammar."""
MEMORY_BYTES = 2**30
"""More than the process has before its first grammar."""
STACK_BYTES = 2**21
"""A quarter of what threads of a worker have: what is not too deep here is not too deep there."""


class Start(msgspec.Struct):
    tokenizer_json: str
    vocab_size: int


class Verdict(msgspec.Struct, omit_defaults=True):
    refusal: str | None = None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the end of the input ends this
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    try:
        vocabulary = Vocabulary.load(start.tokenizer_json, start.vocab_size)
    except InvalidRequest as error:
        for _ in sys.stdin.buffer:
            _answer(Verdict(error.message))
        return
    _limit_memory()
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process
        found: list[Verdict] = []
        thread = threading.Thread(target=_vet, args=(msgspec.json.decode(line, type=Grammar), vocabulary, found))
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not found:
            sys.exit(1)  # a defect, which the thread has written to stderr
        _answer(found[0])


def _vet(grammar: Grammar, vocabulary: Vocabulary, found: list[Verdict]) -> None:
    try:
        vet(grammar, vocabulary)
    except InvalidRequest as error:
        found.append(Verdict(error.message))
    except MemoryError:
        found.append(Verdict("it takes too much memory"))
    else:
        found.append(Verdict())


def _answer(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Of the address space: the bound that Linux keeps. Other systems have the one on time only."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))


if __name__ == "__main__":
    main()
