"""`python -m engine.native` compiles the kernels for this machine ahead of the first start, and says where they are."""

from __future__ import annotations

import logging

from engine.native import library

logging.basicConfig(format="%(message)s")
if library.load():
    print(f"native kernels: {library.library_path()}")
