"""(x Q^T) s for a few rows on a GPU, reading Q as bytes: a product of few rows waits for its weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 16
"""Of a program: the least that a tensor core takes."""
_OUTPUTS = 32
_INPUTS = 128


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
    x, weight, scales, out, rows, outputs, inputs, x_stride,
    row_block: tl.constexpr, output_block: tl.constexpr, input_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    output = tl.program_id(0) * output_block + tl.arange(0, output_block)
    total = tl.zeros((row_block, output_block), dtype=tl.float32)
    for start in range(0, inputs, input_block):
        column = start + tl.arange(0, input_block)
        inside = column < inputs
        part = tl.load(
            x + row[:, None] * x_stride + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        integers = tl.load(
            weight + output[None, :].to(tl.int64) * inputs + column[:, None],
            mask=(output < outputs)[None, :] & inside[:, None],
            other=0,
        )
        total = tl.dot(part, integers.to(part.dtype), total, input_precision="ieee")
    scale = tl.load(scales + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(
        out + row[:, None] * outputs + output[None, :],
        (total * scale[None, :]).to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (output < outputs)[None, :],
    )


def product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x: [rows, inputs], weight: [outputs, inputs] int8, scales: [outputs] -> [rows, outputs], of x's type."""
    rows, inputs = x.shape
    outputs = len(weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(rows, _ROWS))
    _product[grid](x, weight, scales, out, rows, outputs, inputs, x.stride(0), _ROWS, _OUTPUTS, _INPUTS)
    return out
