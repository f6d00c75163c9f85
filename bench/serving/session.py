"""One benchmark from start to end: warm up, offer the load, report."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from time import perf_counter

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.serving import report
from bench.serving.client import Client
from bench.serving.load import Run, offer, stop_on_interrupt
from bench.serving.options import ServeOptions
from bench.serving.prepare import RETRY_S, Prepared, prepare
from bench.serving.timeline import Timeline
from core.errors import Unavailable

OK, ALL_FAILED, INTERRUPTED = 0, 1, 130


def run_benchmark(options: ServeOptions) -> int:
    """Print the table, save the result, and return the exit status. Raises ConfigError or Unavailable."""
    prepared = prepare(options)
    date = datetime.now()  # local time, as in the names of vLLM's files
    path = report.result_path(options, prepared.model, date)
    categories = [prompt.category for prompt in prepared.prompts]
    nothing = Run([], began=0.0, duration=0.0, cpu=0.0, interrupted=False)
    report.build_result(options, prepared.model, nothing, categories, date)  # refuses bad --metadata before the run
    _allow_many_sockets()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run = runner.run(_run(options, prepared))
    result = report.build_result(options, prepared.model, run, categories, date)
    click.echo(report.table(result, options))
    for line in report.warnings(result):
        click.echo(f"Warning: {line}", err=True)
    if path is not None:
        report.save(result, path, append=options.append_result)
        click.echo(f"Result saved to {path}", err=True)
    if run.interrupted:
        return INTERRUPTED
    return OK if result["completed"] else ALL_FAILED


async def _run(options: ServeOptions, prepared: Prepared) -> Run:
    client = Client(prepared.http, options.request_timeout, keep_text=options.save_detailed)
    stop = asyncio.Event()
    try:
        with stop_on_interrupt(stop):
            await _warm_up(client, options, prepared.requests[0], stop)
            click.echo(_announcement(options, prepared), err=True)
            with _progress(len(prepared.requests), hidden=options.disable_tqdm) as progress:
                return await offer(
                    client,
                    prepared.requests,
                    prepared.offsets,
                    max_concurrency=options.max_concurrency,
                    on_end=progress,
                    stop=stop,
                )
    finally:
        prepared.http.close()


async def _warm_up(client: Client, options: ServeOptions, request: bytes, stop: asyncio.Event) -> None:
    """The ready check, then the warm-ups, all with the first prompt, as in vLLM. Raises Unavailable."""
    deadline = perf_counter() + options.ready_check_timeout_sec
    while options.ready_check_timeout_sec and not stop.is_set():
        timeline = await client.run(request, Timeline(index=0))
        if timeline.completed:
            break
        if perf_counter() >= deadline:
            raise Unavailable(f"--ready-check-timeout-sec: no request succeeded in time: {timeline.error}")
        await asyncio.sleep(RETRY_S)
    count = options.num_warmups
    run = await offer(client, [request] * count, [0.0] * count, max_concurrency=options.max_concurrency, stop=stop)
    failed = [t for t in run.timelines if t.error is not None]
    if failed:
        raise Unavailable(f"--num-warmups: {len(failed)} of {count} warm-ups failed: {failed[0].error}")


def _announcement(options: ServeOptions, prepared: Prepared) -> str:
    process = "Poisson" if options.burstiness == 1 else f"gamma, shape {options.burstiness:g}"
    rate = "all at once" if options.request_rate == float("inf") else f"{options.request_rate:g} req/s ({process})"
    limit = f", at most {options.max_concurrency} at a time" if options.max_concurrency else ""
    return f"{len(prepared.requests)} requests for {prepared.model} to {options.api_url}: {rate}{limit}"


class _Counter:
    """Shows each ended request, and how many of them failed."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._bar = progress.add_task("", total=total)
        self._failed = 0

    def __call__(self, timeline: Timeline) -> None:
        self._failed += timeline.error is not None
        self._progress.update(self._bar, advance=1, description=f"{self._failed} failed" if self._failed else "")


@contextmanager
def _progress(total: int, *, hidden: bool) -> Iterator[_Counter]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    hidden = hidden or not sys.stderr.isatty()
    # Twice a second: drawing costs CPU that the server under test may need.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, disable=hidden) as progress:
        yield _Counter(progress, total)


def _allow_many_sockets() -> None:
    """Each request under way holds a socket: raise the soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
