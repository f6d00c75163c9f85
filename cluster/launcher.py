"""`slipstream serve`: from a command line to a cluster that answers, and back to nothing."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.checklist import Checklist
from cluster.checks import check_memory, check_port
from cluster.config import SlipstreamConfig
from cluster.resources import Share, share_out
from core.errors import ConfigError

READY_TIMEOUT_S = 300.0
POLL_S = 0.1


def serve(config: SlipstreamConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError for whatever keeps it from starting."""
    checklist = Checklist(console)
    with stop_signals() as stop:
        folder = _prepare(config, checklist)
        with _ray(config, checklist) as share:
            handle = _deploy(config, folder, share, checklist, stop)
            if not stop.is_set():
                _print_urls(config, handle.address.remote().result(), checklist, console)
                _watch(stop, console)
            _drain(config, handle, console)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. A second signal interrupts at once."""
    stop = threading.Event()

    def handler(_signum: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _prepare(config: SlipstreamConfig, checklist: Checklist) -> Path:
    from cluster.limits import max_model_len
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars
    from engine.model_config import ModelConfig

    check_port(config.gateway.host, config.gateway.port)
    with Bars() as progress:
        folder = resolve(config.model, revision=config.revision, progress=progress, check_config=ModelConfig.from_dict)
    with checklist.step("model") as line:
        model = ModelConfig.from_folder(folder)  # an unsupported model is refused before any process starts
        line.note = f"{model.architecture}, up to {max_model_len(model, config.engine)} tokens, {folder}"
    with checklist.step("memory") as line:
        line.note = check_memory(config, folder)
    return folder


@contextmanager
def _ray(config: SlipstreamConfig, checklist: Checklist) -> Iterator[Share]:
    """A Ray cluster: the one at ray_address, or one of our own that goes when we do. Yields what each worker gets."""
    import ray

    own = None if config.cluster.ray_address else Path(tempfile.mkdtemp(prefix="slipstream-"))
    options: dict[str, Any] = {"namespace": "slipstream", "log_to_driver": False, "logging_level": logging.ERROR}
    if own is None:
        options["address"] = config.cluster.ray_address
    else:
        options |= {
            "address": "local",
            "num_cpus": os.cpu_count(),
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "_temp_dir": str(own),
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with checklist.step("ray") as line:
            try:
                ray.init(**options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"Ray does not start: {str(error).splitlines()[0]}") from error
            resources = ray.cluster_resources()
            share = share_out(config, resources.get("CPU", 0.0), resources.get("GPU", 0.0))
            line.note = str(share)
        yield share
    finally:
        ray.shutdown()
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _deploy(config: SlipstreamConfig, folder: Path, share: Share, checklist: Checklist, stop: threading.Event) -> Any:
    """Deploy and wait until a request would succeed, or `stop`."""
    from ray import serve as ray_serve

    from cluster.app import APP_NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the checklist says the rest; importing Serve resets it
    with checklist.step("deploy"):
        ray_serve.start(proxy_location="Disabled")
        (handle,) = ray_serve.run_many(
            [ray_serve.RunTarget(target=build(config, str(folder), share), name=APP_NAME, route_prefix=None)],
            wait_for_applications_running=False,
        )
    for name in ("controller", "worker-tp1-pp1", "gateway"):
        with checklist.step(name) as line:
            _wait_healthy(name, stop)
            line.note = "running"
    with checklist.step("ready") as line:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not stop.is_set():
            ready, reason = handle.ready.remote().result()
            if ready:
                break
            if time.monotonic() > deadline:
                raise ConfigError(f"not ready after {READY_TIMEOUT_S:g} s: {reason}")
            time.sleep(POLL_S)
        line.note = ", ".join(f"{count} {role.value}" for role, count in config.cluster.roles.items())
    return handle


def _wait_healthy(deployment: str, stop: threading.Event) -> None:
    """Raises ConfigError with what the replica said when it can't start."""
    from ray import serve as ray_serve

    from cluster.app import APP_NAME

    deadline = time.monotonic() + READY_TIMEOUT_S
    while not stop.is_set():
        app = ray_serve.status().applications.get(APP_NAME)
        state = app.deployments.get(deployment) if app is not None else None
        if state is not None and state.status == "HEALTHY":
            return
        failed = state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY")
        if failed or (app is not None and app.status == "DEPLOY_FAILED"):
            raise ConfigError(f"{deployment} does not start: {_last_line(state.message if state else app.message)}")
        if time.monotonic() > deadline:
            raise ConfigError(f"{deployment} is not up after {READY_TIMEOUT_S:g} s; see the logs of Ray Serve")
        time.sleep(POLL_S)


def _last_line(message: str) -> str:
    """The exception at the end of a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "core.errors" in line]
    return (errors or lines or ["no reason given"])[-1]


def _print_urls(config: SlipstreamConfig, url: str, checklist: Checklist, console: Console) -> None:
    name = config.gateway.served_model_name or config.model
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console.print(f"\nServing {name} after {checklist.seconds:.1f} s. Ctrl-C stops.\n", highlight=False)
    for title, path in (("API", "/v1"), ("health", "/health"), ("metrics", "/metrics")):
        console.print(f"  {title:<10}{url}{path}", highlight=False, soft_wrap=True)
    console.print(
        f"\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _watch(stop: threading.Event, console: Console) -> None:
    """Wait for the signal; say so when a deployment changes its health."""
    from ray import serve as ray_serve

    from cluster.app import APP_NAME

    last = "RUNNING"
    while not stop.wait(1.0):
        app = ray_serve.status().applications.get(APP_NAME)
        now = str(app.status.value if app is not None else "GONE")
        if now != last:
            console.print(f"cluster is {now.lower()}", highlight=False)
            last = now


def _drain(config: SlipstreamConfig, handle: Any, console: Console) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    from cluster.app import APP_NAME

    console.print(f"Draining, at most {config.gateway.drain_timeout_s:g} s …", highlight=False)
    started = time.monotonic()
    try:
        handle.drain.remote().result(timeout_s=config.gateway.drain_timeout_s + 1.0)
    except (RayError, TimeoutError) as error:
        console.print(f"the gateway did not drain: {str(error).splitlines()[0]}", highlight=False)
    ray_serve.delete(APP_NAME)  # Serve itself goes with the cluster, or stays if the cluster is not ours
    console.print(f"Stopped after {time.monotonic() - started:.1f} s.", highlight=False)
