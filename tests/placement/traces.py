"""Files of requests."""

from __future__ import annotations

import json
from pathlib import Path


def by_turns(folder: Path, prompts: int) -> Path:
    """A request a second, for two minutes: so many prompts by turns, of three blocks of 512 tokens each, in Mooncake's
    format."""
    hashes = [[3 * prompt, 3 * prompt + 1, 3 * prompt + 2] for prompt in range(prompts)]
    lines = [
        {"timestamp": 1000 * at, "input_length": 1536, "output_length": 20, "hash_ids": hashes[at % prompts]}
        for at in range(120)
    ]
    (folder / f"{prompts}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / f"{prompts}.jsonl"
