"""A cluster as a user starts it: `slipstream serve FOLDER` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny import save_tiny_llama

START_S = 120.0
TIMEOUT_S = 60.0
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges, over the alphabet below: 128 tokens cannot hold all bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,!?<>|'\n"
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([alphabet], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}'
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    url: str
    output: list[str]

    @property
    def tree(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def titled(self, part: str) -> list[psutil.Process]:
        """Those with it in their command line."""
        return [process for process in self.tree if part in _command(process)]

    def replicas(self, deployment: str) -> list[psutil.Process]:
        return self.titled(f"ServeReplica:slipstream:{deployment}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        with self.process:  # closes its output
            self.output.extend(self.process.stdout or [])
            return self.process.wait(TIMEOUT_S)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text

    @property
    def roles(self) -> list[str]:
        """Of the workers that are alive."""
        lines = [line for line in self.metrics().splitlines() if line.startswith("vllm:num_requests_running{")]
        return sorted(re.findall(r'role="(\w+)"', "".join(lines)))


def _command(process: psutil.Process) -> str:
    """Empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def launch(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start, without waiting for anything; standard error goes to standard output."""
    command = [sys.executable, "-m", "cluster", "serve", str(folder), "--port", "0", "--served-model-name", "tiny"]
    command += ["--kv-cache-memory", "16MiB", "--dtype", "float32"]
    command += [] if "--colocated" in flags else ["--handoff-min-tokens", "0"]
    with _hangup_as_from_a_terminal():
        return subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def _hangup_as_from_a_terminal() -> Iterator[None]:
    """Whoever runs the tests may ignore SIGHUP (nohup does), and children inherit that.

    Not a `preexec_fn`: that takes fork instead of vfork, and gRPC's fork handlers, with servers of
    earlier tests still in this process, can crash the child before it executes anything.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def start(folder: Path, *flags: str) -> Server:
    """Start and wait for the URLs on standard output."""
    process = launch(folder, *flags)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"curl (http://\S+?)/v1", line):
            return Server(process, found[1], lines)
    with process:
        process.wait(TIMEOUT_S)
    raise AssertionError("the server did not start:\n" + "".join(lines))


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[Server]:
    """Started, and stopped unless it has been."""
    server = start(folder, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def session(server: Server) -> Path:
    """The folder of the cluster's Ray session."""
    flags = (flag for process in server.tree for flag in process.cmdline())
    return next(Path(flag.split("=", 1)[1]).parent for flag in flags if flag.startswith("--session-dir="))


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=TIMEOUT_S)[1]


def assert_drained(server: Server, number: signal.Signals) -> None:
    """The signal stops it in order, and nothing is left."""
    processes, where = server.tree, session(server)
    assert server.stop(number) == 0
    text = "".join(server.output)
    assert "Draining" in text
    assert "Stopped after" in text
    assert "SIGTERM received" not in text
    assert alive(processes) == []
    assert not where.exists()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder) as server:
        yield server
