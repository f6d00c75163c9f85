"""Whether a grammar can be followed: found out before a worker sees it, in a process of its own.

The compiler takes input from anybody and is native code: a grammar may send it into minutes of work, gigabytes, or a
recursion without end. A process can be ended, which a thread can't, and takes nobody with it. It is started by the
first grammar and stays, since starting it takes half a second; one that was ended is replaced by the next grammar.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from core.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from core.types import Grammar
from gateway.vetting_process import CPU_SECONDS, Start, Verdict

WAIT_S = 20.0
"""Wall time for one grammar: ten times its processor time, for machines that are busy."""
MAX_KNOWN = 256
"""Verdicts remembered."""
MAX_WAITING = 64
"""Grammars under way or waiting for their turn; one more is refused with 429."""

_REFUSALS = {
    -signal.SIGPROF: f"it takes more than {CPU_SECONDS:g} s to compile; simplify it",
    **dict.fromkeys(
        (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT), "it is nested too deeply or takes too much memory"
    ),
}
"""How the process ended, and what that says of the grammar."""


class Vetting:
    """`load` gives the tokenizer.json of the model; it is called, in a thread, when the first grammar comes. Belongs to
    one event loop, which it does not stall."""

    def __init__(self, load: Callable[[], str], vocab_size: int) -> None:
        self._process = _VettingProcess(load, vocab_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vetting")
        self._num_waiting = 0
        self._known: OrderedDict[Grammar, str | None] = OrderedDict()

    async def check(self, param: str, grammar: Grammar) -> None:
        """Raises InvalidRequest naming `param` and the reason if the grammar can't be followed."""
        if grammar not in self._known:
            self._known[grammar] = await self._vet(grammar)
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(grammar)
        if (refusal := self._known[grammar]) is not None:
            raise InvalidRequest(f"{param}: {refusal}", param=param)

    async def _vet(self, grammar: Grammar) -> str | None:
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{self._num_waiting} grammars are waiting to be checked; retry later")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._process.vet, grammar)
        finally:
            self._num_waiting -= 1


class _VettingProcess:
    """Belongs to one thread."""

    def __init__(self, load: Callable[[], str], vocab_size: int) -> None:
        self._load = load
        self._vocab_size = vocab_size
        self._child: subprocess.Popen[bytes] | None = None

    def vet(self, grammar: Grammar) -> str | None:
        """None, or why it is refused. Raises Unavailable if there was no time to find out."""
        child = self._child
        if child is not None and child.poll() is not None:  # somebody else has ended it since the last grammar
            self._stop()
            child = None
        if child is None:
            child = self._start()
        try:
            _send(child, grammar)
            line = _receive(child)
        except BrokenPipeError:
            line = b""
        if line is not None and line.endswith(b"\n"):
            return msgspec.json.decode(line, type=Verdict).refusal
        self._child = None
        self._stop()
        if line is None:
            raise Unavailable(f"the grammar could not be checked within {WAIT_S:g} s; retry later")
        if child.returncode not in _REFUSALS:
            raise InternalError(f"the process that checks grammars ended with status {child.returncode}")
        return _REFUSALS[child.returncode]

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", "gateway.vetting_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._child = child
        self._stop = weakref.finalize(self, _stop, child)
        _send(child, Start(self._load(), self._vocab_size))
        return child


def _send(child: subprocess.Popen[bytes], message: Start | Grammar) -> None:
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(message) + b"\n")
    child.stdin.flush()


def _receive(child: subprocess.Popen[bytes]) -> bytes | None:
    """A line, nothing if the process has ended, None after WAIT_S."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], WAIT_S)[0]:
        return None
    return child.stdout.readline()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Leaves neither the process nor its pipes behind."""
    child.kill()
    child.communicate()
