"""The folder of a model on the node that asks."""

from __future__ import annotations

from pathlib import Path

from cluster.config.tree import SlipstreamConfig


def at_hand(config: SlipstreamConfig, folder: str) -> Path:
    """`folder`, where it was prepared, if this node has it; else the model is fetched here. Raises ModelError."""
    if Path(folder, "config.json").is_file():
        return Path(folder)
    from engine.checkpoints import Silent, resolve

    return resolve(config.model, revision=config.revision, progress=Silent())
