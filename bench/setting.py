"""Under what conditions a measurement of an engine holds."""

from __future__ import annotations

import platform
from typing import Any

import torch

from cluster.machine import versions
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner


def setting_of(runner: ModelRunner | GroupRunner) -> dict[str, Any]:
    """Keys of a JSON result."""
    device = runner.pool.device
    return {
        "dtype": runner.layout.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions() | {"python": platform.python_version()},
    }
