"""A worker of a layout, or its gateway, in a process of its own, as they are in a cluster, without Ray around them.

    python -m bench.planning.part PART

PART is a Part as JSON. Once it is ready it prints a line: a worker its Member, the gateway its URL. It ends when its
standard input does, or with an error in one line.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from cluster.client import ClusterBackend
from cluster.config.loading import validated
from cluster.config.tree import SlipstreamConfig
from cluster.membership import Member
from cluster.one_line import one_line
from cluster.routes import Routes
from core.errors import Unavailable
from core.types import Role

_READY_S = 30.0
"""For workers that listen already to answer their gateway."""


class Part(msgspec.Struct):
    """`tree` is the configuration. A worker has `worker_id`, `role` and `threads`; without them it is the gateway of
    `members`."""

    tree: dict[str, Any]
    folder: str
    worker_id: str = ""
    role: Role = Role.BOTH
    threads: int = 1
    members: list[Member] = []


async def work(part: Part, config: SlipstreamConfig) -> None:
    from cluster.worker import load_runner, make_node

    folder = Path(part.folder)
    runner = load_runner(folder, config.for_role(part.role).engine, part.threads, config.speculation.settings)
    node = make_node(part.worker_id, part.role, runner, config, folder)
    address = await node.start("127.0.0.1")
    member = Member(worker_id=part.worker_id, address=address, role=part.role, layout=runner.layout)
    await _until_stdin_ends(msgspec.json.encode(member).decode())
    await node.stop()


async def answer(part: Part, config: SlipstreamConfig) -> None:
    """Raises Unavailable if there is a worker that doesn't answer."""
    from cluster.front import Front

    async def members() -> list[Member]:
        return part.members

    backend = ClusterBackend(members, routes=Routes.of(config), expected_workers=len(part.members))
    front = Front(config, Path(part.folder), backend)
    await front.start()
    try:
        async with asyncio.timeout(_READY_S):
            await backend.wait_ready()
        await _until_stdin_ends(front.url)
    except TimeoutError as error:
        lost = {member.worker_id for member in part.members} - {up.worker_id for up in backend.status().workers}
        raise Unavailable(f"{', '.join(sorted(lost))} did not answer the gateway in {_READY_S:g} s") from error
    finally:
        await front.stop()


async def _until_stdin_ends(ready: str) -> None:
    print(ready, flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    part = msgspec.json.decode(sys.argv[1], type=Part)
    config = validated(part.tree)
    with one_line():
        asyncio.run(work(part, config) if part.worker_id else answer(part, config))


if __name__ == "__main__":
    main()
