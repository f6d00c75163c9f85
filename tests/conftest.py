"""What holds for every test, and for the processes that tests start."""

from __future__ import annotations

import os

# Before NumPy or PyTorch is imported. The matrices here are small, and threads that wait for their part of one spin: a
# test of replanning took 5.7 s of processor time on two cores, and takes 2.6 s on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
