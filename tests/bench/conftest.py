from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sse_server import Server

from bench.serving.cli import resolve_options, serve
from bench.serving.options import ServeOptions
from tests.tiny import save_tiny_llama


@pytest.fixture
def server() -> Iterator[Server]:
    """Runs on a loop and a thread of its own, as the benchmark needs the main one."""
    server = Server()
    started = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        stop = asyncio.Event()
        server.stop = lambda: loop.call_soon_threadsafe(stop.set)  # type: ignore[attr-defined]
        listener = await asyncio.start_server(server.connected, "127.0.0.1", 0)
        server.port = listener.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listener.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    yield server
    server.stop()  # type: ignore[attr-defined]
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def make_options() -> Callable[..., ServeOptions]:
    """Options as the command line would make them, with some fields replaced."""

    def make(*args: str, **changes: Any) -> ServeOptions:
        context = serve.make_context("serve", list(args))
        return dataclasses.replace(resolve_options(context.params), **changes)

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose tokenizer is never used."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder
