"""`slipstream serve`: from a command line to a cluster that answers, and back to nothing."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.checklist import Checklist
from cluster.checks import check_kv_transport, check_memory, hold_port
from cluster.config.loading import on_device
from cluster.config.tree import SlipstreamConfig
from cluster.groups import groups_of
from cluster.machine import has_gpu, usable_cores
from cluster.ray_nodes import CLIENT, check_there, nodes_of, on_node
from cluster.resources import Share, share_on
from cluster.session import session_folder
from cluster.signals import Stop, Stopped, stop_signals
from core.errors import ConfigError
from core.replan_metrics import Decided

READY_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 10.0
DELETE_TIMEOUT_S = 60.0
POLL_S = 0.1


def serve(config: SlipstreamConfig, console: Console) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP. Returns the exit status: 0 if it had been ready and has drained. Raises
    ConfigError for whatever keeps it from starting."""
    with stop_signals() as stop:
        try:
            _serve(config, stop, console)
        except Stopped:  # the checklist has said where
            return stop.exit_status
        except KeyboardInterrupt:
            how = "at once, without waiting for running requests" if stop.in_order else "before anything was started"
            console.print(f"Stopped {how}.", highlight=False)
            return stop.exit_status
    return 0


def _serve(config: SlipstreamConfig, stop: Stop, console: Console) -> None:
    checklist = Checklist(console)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    if config.cluster.ray_address:
        check_there(config.cluster.ray_address)
    elif not has_gpu():
        config = on_device(config, "cpu")
    with _hold_port(config) as port:
        config = config.model_copy(update={"gateway": config.gateway.model_copy(update={"port": port})})
        _serve_held(config, stop, checklist, console, say)


def _hold_port(config: SlipstreamConfig) -> AbstractContextManager[int]:
    """The gateway runs here, and so does the one that replaces it; that of a client of Ray's on the head node."""
    if (config.cluster.ray_address or "").startswith(CLIENT):
        return nullcontext(config.gateway.port)
    return hold_port(config.gateway.host, config.gateway.port)


def _serve_held(
    config: SlipstreamConfig, stop: Stop, checklist: Checklist, console: Console, say: Callable[[str], None]
) -> None:
    """With the port of the gateway kept for it."""
    folder = _prepare(config, checklist)
    with (
        _ray(config, stop, checklist, say) as shares,
        _application(config, folder, shares, stop, checklist, say) as handle,
    ):
        url = _wait_ready(config, handle, stop, checklist)
        _print_urls(config, url, checklist, console)
        _watch(config, handle, stop, say)
        stopping = time.monotonic()
        console.quiet = console.is_terminal and stop.signum == signal.SIGHUP  # the terminal has gone
        _drain(config, handle, say)
    say(f"Stopped after {time.monotonic() - stopping:.1f} s.")


def _prepare(config: SlipstreamConfig, checklist: Checklist) -> Path:
    from cluster.limits import max_model_len
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars
    from engine.lora.checkpoint import read_adapters
    from engine.model_config import ModelConfig
    from engine.parallel.split import check_split
    from engine.weight_check import check_weights

    check_kv_transport(config)
    if config.replan.mode != "off":
        from cluster.replan_setup import read_files

        read_files(config)  # again once the cores of workers are known, but nobody waits until then to hear of a slip
    with Bars() as progress:
        folder = resolve(config.model, revision=config.revision, progress=progress, check_config=ModelConfig.from_dict)
    with checklist.step("model") as line:
        model = ModelConfig.from_folder(folder)  # an unsupported model is refused before any process starts
        for group in groups_of(config):
            engine, flags = group.config.engine, "--prefill-" if group.prefills_only else "--"
            check_split(model, engine.tensor_parallel_size, engine.pipeline_parallel_size, flags)
        check_weights(folder, model)
        adapters = read_adapters(config.engine.adapters, folder, config.engine.max_lora_rank)
        line.note = f"{model.architecture}, up to {max_model_len(model, config.engine)} tokens, {folder}"
        line.note += f", {len(adapters)} adapters" if adapters else ""
        if (settings := config.speculation.settings) is not None:
            settings.check_weights(folder, config.engine.dtype)
        line.note += f", drafts by {', '.join(config.speculation.drafter)}" if config.speculation.drafter else ""
    with checklist.step("memory") as line:
        line.note = check_memory(config, folder)
    return folder


@contextmanager
def _ray(
    config: SlipstreamConfig, stop: Stop, checklist: Checklist, say: Callable[[str], None]
) -> Iterator[list[Share]]:
    """A Ray cluster: the one at ray_address, or one of our own that goes when we do. Yields what each worker gets, by
    group."""
    own = nullcontext() if config.cluster.ray_address else session_folder(say)
    with own as folder:
        if folder is not None:
            # Ray replaces a loopback address by the machine's, unless it takes itself to be on a system without
            # clusters; it reads this when it is imported.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            # Ray's workers give way to every other process of the machine by default. Ours are what it is for.
            os.environ.setdefault("RAY_worker_niceness", "0")
        import ray
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        stop.in_order = True
        try:
            with checklist.step("ray") as line:
                _init_ray(config, folder, stop)
                shares = share_on(config, nodes_of(ray.nodes()))
                line.note = "; ".join(map(str, shares))
            yield shares
        except (RayError, RayServeException) as error:
            raise ConfigError(f"the Ray cluster does not answer: {_last_line(str(error))}") from error
        finally:
            ray.shutdown()


def _init_ray(config: SlipstreamConfig, folder: Path | None, stop: Stop) -> None:
    import ray

    options: dict[str, Any] = {"namespace": "slipstream", "log_to_driver": False, "logging_level": logging.ERROR}
    if folder is None:
        options["address"] = config.cluster.ray_address
    else:
        options |= {
            "address": "local",
            "num_cpus": usable_cores(),
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "_temp_dir": str(folder),
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "; a cluster with token authentication needs RAY_AUTH_MODE=token here too" if folder is None else ""
        raise ConfigError(f"Ray does not start: {str(error).splitlines()[0]}{hint}") from error
    except SystemExit as error:  # while it starts, SIGTERM goes to a handler of Ray's that ends in this
        stop.signum = signal.SIGTERM
        raise Stopped from error
    stop.install()  # Ray has put handlers of its own there
    stop.check()


@contextmanager
def _application(
    config: SlipstreamConfig,
    folder: Path,
    shares: list[Share],
    stop: Stop,
    checklist: Checklist,
    say: Callable[[str], None],
) -> Iterator[Any]:
    """Deploys; yields the handle of the gateway. From a cluster that is not ours the application is deleted in any
    case; one of our own takes it along, and is given time to end in order if it was ready."""
    import ray
    from ray import serve as ray_serve

    from cluster.app import APP_NAME, build
    from cluster.serve_scale import applications

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the checklist says the rest; importing Serve resets it
    with checklist.step("deploy"):
        ray_serve.start(proxy_location="Disabled")
        stop.install()
        stop.check()
        if APP_NAME in applications():
            raise ConfigError(
                f"the Ray cluster at {config.cluster.ray_address} runs an application {APP_NAME} already; stop that "
                "one first, or use another cluster"
            )
        here = ray.get_runtime_context().get_node_id()  # for a client: the head node
        application = build(config, str(folder), shares, gateway_on=on_node(here))
    ended = False
    try:
        target = ray_serve.RunTarget(
            application, APP_NAME, route_prefix=None, external_scaler_enabled=config.replan.mode == "on"
        )
        (handle,) = ray_serve.run_many([target], wait_for_applications_running=False)
        yield handle
        ended = True
    finally:
        if ended or config.cluster.ray_address:
            _delete(say)


def _delete(say: Callable[[str], None]) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.app import APP_NAME
    from cluster.serve_scale import applications

    try:
        ray_serve.delete(APP_NAME, _blocking=False)  # Serve goes with the cluster, or stays if the cluster is not ours
        deadline = time.monotonic() + DELETE_TIMEOUT_S
        while APP_NAME in applications():  # Serve's own wait looks once a second
            if time.monotonic() > deadline:
                raise TimeoutError(f"it is still there after {DELETE_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
    except (RayError, RayServeException, TimeoutError) as error:
        say(f"the application {APP_NAME} could not be deleted from the cluster: {_last_line(str(error))}")


def _wait_ready(config: SlipstreamConfig, handle: Any, stop: Stop, checklist: Checklist) -> str:
    """Wait until a request would succeed; returns the gateway's URL. Raises Stopped, and ConfigError with the reason
    when it does not come to that."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    for name in ("controller", *(group.name for group in groups_of(config)), "gateway"):
        with checklist.step(name) as line:
            _wait_healthy(name, stop)
            line.note = "running"
    with checklist.step("ready") as line:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            stop.check()
            try:
                ready, reason = handle.ready.remote().result(timeout_s=CALL_TIMEOUT_S)
                url = str(handle.address.remote().result(timeout_s=CALL_TIMEOUT_S))
            except (RayError, RayServeException, TimeoutError) as error:  # Serve starts another gateway
                ready, reason = False, f"the gateway does not answer: {_last_line(str(error))}"
            if ready:
                break
            if time.monotonic() > deadline:
                raise ConfigError(f"not ready after {READY_TIMEOUT_S:g} s: {reason}")
            stop.wait(POLL_S)
        line.note = ", ".join(f"{count} {role.value}" for role, count in config.cluster.roles.items())
    return url


def _wait_healthy(deployment: str, stop: Stop) -> None:
    """Raises ConfigError with what the replica said when it can't start, and Stopped."""

    from cluster.app import APP_NAME
    from cluster.serve_scale import applications

    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        stop.check()
        app = applications().get(APP_NAME)
        state = app["deployments"].get(deployment) if app is not None else None
        if state is not None and state["status"] == "HEALTHY":
            return
        failed = state is not None and state["status"] in ("DEPLOY_FAILED", "UNHEALTHY")
        if app is not None and (failed or app["status"] == "DEPLOY_FAILED"):
            raise ConfigError(f"{deployment} does not start: {_last_line((state or app)['message'])}")
        if time.monotonic() > deadline:
            raise ConfigError(f"{deployment} is not up after {READY_TIMEOUT_S:g} s; see the logs of Ray Serve")
        stop.wait(POLL_S)


def _last_line(message: str) -> str:
    """The exception at the end of a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "core.errors" in line]
    return (errors or lines or ["no reason given"])[-1]


def _print_urls(config: SlipstreamConfig, url: str, checklist: Checklist, console: Console) -> None:
    name = config.served_name
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


def _watch(config: SlipstreamConfig, handle: Any, stop: Stop, say: Callable[[str], None]) -> None:
    """Wait for the signal; say so when the application changes its health, and what replanning decides."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.app import APP_NAME
    from cluster.serve_scale import applications

    last, said_s = "running", 0.0
    while True:
        stopped = stop.wait(1.0)
        for decided in _decided(handle, said_s) if config.replan.mode != "off" else ():
            say(f"replanning: {decided}")
            said_s = decided.at_s
        if stopped:
            return
        try:
            app = applications().get(APP_NAME)
            now = app["status"].lower() if app is not None else "gone"
        except (RayError, RayServeException) as error:  # requests don't pass through Serve
            now = f"not answering: {_last_line(str(error))}"
        if now != last:
            say(f"cluster is {now}")
            last = now


def _decided(handle: Any, since_s: float) -> list[Decided]:
    """What replanning has decided since; nothing while the gateway does not answer."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        lately: list[Decided] = handle.decided.remote().result(timeout_s=1.0)
    except (RayError, RayServeException, TimeoutError):
        return []
    return [decided for decided in lately if decided.at_s > since_s]


def _drain(config: SlipstreamConfig, handle: Any, say: Callable[[str], None]) -> None:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    say(f"Draining, at most {config.gateway.drain_timeout_s:g} s …")
    try:
        handle.drain.remote().result(timeout_s=config.gateway.drain_timeout_s + 1.0)
    except (RayError, RayServeException, TimeoutError) as error:
        say(f"the gateway did not drain: {_last_line(str(error))}")
