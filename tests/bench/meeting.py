"""`python -m tests.bench.meeting "FOLDER ONE OTHER"`: ready once the other is there too."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main() -> None:
    folder, one, other = sys.argv[1].split()
    (Path(folder) / one).touch()
    deadline = time.monotonic() + 60
    while not (Path(folder) / other).exists():
        if time.monotonic() > deadline:
            sys.exit(f"{other} was not started")
        time.sleep(0.01)
    print(f"{one} met {other}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
