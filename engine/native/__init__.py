"""The CPU kernels of our own, in C++ (csrc/): linear layers with what surrounds them, rotary embedding and paged
attention, for bfloat16 with AVX-512. They are compiled once for a machine and kept in the user's cache; where they
can't be had, PyTorch's operators do the same work."""
