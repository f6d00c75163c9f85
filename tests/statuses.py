"""What workers report, for tests to which little of it matters."""

from __future__ import annotations

from core.types import Role
from core.wire import WorkerCounters, WorkerStatus


def status(worker_id: str, role: Role = Role.DECODE, **told: object) -> WorkerStatus:
    """Of a worker with nothing to do and every block free, but for what is `told`."""
    values: dict[str, object] = {
        "num_running": 0,
        "num_waiting": 0,
        "num_waiting_tokens": 0,
        "num_free_blocks": 100,
        "num_blocks": 100,
        "block_size": 16,
        "max_num_seqs": 8,
        "counters": WorkerCounters(),
    }
    return WorkerStatus(worker_id=worker_id, role=role, **(values | told))  # type: ignore[arg-type]
