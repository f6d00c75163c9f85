"""The gateway process: HTTP application, its server, and the sessions to the workers. Knows nothing of Ray."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from cluster.client import ClusterBackend
from cluster.config.tree import SlipstreamConfig
from cluster.limits import max_model_len
from cluster.notation import parse_bytes
from core.errors import InternalError
from core.metrics import GatewayMetrics
from engine.model_config import ModelConfig
from gateway.app import create_app
from gateway.config import GatewayConfig, SpeculationOffer
from gateway.server import HttpServer
from gateway.tokenizer import ServedModel
from speculation.rules.registry import DEFAULT_RULE

ACQUAINTANCE_S = 3.0
"""Workers answer within a second, unless they are still to be started."""
ALL_ADDRESSES = ("", "0.0.0.0", "::")  # noqa: S104
"""Hosts to listen on that are none to call."""


def offer(config: SlipstreamConfig) -> SpeculationOffer | None:
    """What requests may ask of the workers' speculation; None if there is none."""
    settings = config.speculation.settings
    if settings is None:
        return None
    rules = {name: settings.rules_for(name) for name in settings.drafters}
    return SpeculationOffer(drafters=rules, budget=settings.max_budget, rule_with_logprobs=DEFAULT_RULE)


class Front:
    """`await start()` listens; `await stop()` drains and closes everything. `node`: an address of this machine, for the
    URL of a gateway that listens on all of them."""

    def __init__(
        self, config: SlipstreamConfig, folder: Path, backend: ClusterBackend, node: str = "127.0.0.1"
    ) -> None:
        self._backend = backend
        self._node = node
        self._drain_timeout_s = config.gateway.drain_timeout_s
        name = config.served_name
        longest = max_model_len(ModelConfig.from_folder(folder), config.engine)
        bases = {name: m.base_model_name for name, m in config.engine.lora_modules.items() if m.base_model_name}
        model = ServedModel.load(
            folder, [name], max_model_len=longest, adapters=config.engine.adapters, adapter_bases=bases
        )
        settings = config.gateway
        limits = GatewayConfig(
            max_body_bytes=parse_bytes(settings.max_body),
            max_concurrent_requests=settings.max_concurrent_requests,
            max_choices=min(64, settings.max_concurrent_requests),
            request_timeout_s=settings.request_timeout_s,
            seed=settings.seed,
            speculation=offer(config),
        )
        metrics = GatewayMetrics(CollectorRegistry(), model_name=name)
        self._server = HttpServer(create_app(backend, model, limits, metrics), settings.host, settings.port)
        self._listening = False
        self.url = ""

    async def start(self) -> None:
        """Raises ConfigError if the address can't be had. A gateway that replaces another gets to know its workers
        first: who finds nobody listening tries again, and its first requests would be told that no worker is alive."""
        await self._backend.start()
        await self._backend.wait_alive(ACQUAINTANCE_S)
        host, port = await self._server.start()
        self._listening = True
        host = self._node if host in ALL_ADDRESSES else host
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready(self) -> tuple[bool, str]:
        status = self._backend.status()
        return status.ready, status.reason

    def check_health(self) -> None:
        """Raises InternalError when something of this process has ended by itself."""
        if self._listening and not self._server.listening:
            raise InternalError("the HTTP server has ended")
        self._backend.check_health()

    async def drain(self) -> None:
        """Refuse new requests, let the running ones end within drain_timeout_s, end the others with an error."""
        self._listening = False
        await self._server.stop(self._drain_timeout_s)

    async def stop(self) -> None:
        await self.drain()
        await self._backend.stop()
