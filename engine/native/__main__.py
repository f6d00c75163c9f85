"""`python -m engine.native` compiles the kernels for this machine ahead of the first start, and says where they are."""

from __future__ import annotations

import logging

from engine.native import few_rows, library

logging.basicConfig(format="%(message)s")
if library.load():
    print(f"native kernels: {library.library_path()}")
if (found := few_rows.load()) is not None:
    print(f"native kernel for few rows in float32: {found._name}")
