"""Shared by the kernels: tile sizes, tile order, and the product of gathered rows with one expert's matrix."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

MAX_ROWS = 128
"""Rows of the largest bf16 tile; fp32 tiles have half as many."""

GROUP = 8
"""Tiles of rows that visit the columns together, so that they share columns in L2."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tiles(NamedTuple):
    """Sizes of a product's tiles.

    They depend only on shapes, dtype and card. An autotuner would choose by time, and different tiles sum in a
    different order: the last bits would vary between processes.
    """

    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int | bool]:
        """Launch options; fused multiply-adds are explicit since Triton's default will change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def tiles(
    rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device, matrices: int = 1, held: int = 1
) -> Tiles:
    """Tiles of a product (rows, inner) @ (inner, width).

    fp32 products run outside the tensor cores unless tf32 is allowed, and large tiles would only spill registers.

    Args:
        matrices: number of matrices multiplied with the same rows at once.
        held: number of fp32 tiles held in registers at once.
    """
    narrow = dtype.itemsize == 2
    columns = _clamp(width, min(128 if narrow else 64, max(16, 2 * 128 * 128 // (held * rows))))
    depth = _clamp(inner, 64 if narrow else 32)
    stage = (rows + matrices * columns) * depth * dtype.itemsize
    fitting = _shared_memory(device) // stage
    stages = max(2, min(fitting, 4 if fitting >= 8 else 3))  # with three, two blocks share a multiprocessor of an H100
    return Tiles(columns, depth, 8 if held * rows * columns >= 128 * 128 else 4, stages)


def precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products, by torch's setting."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _clamp(width: int, most: int) -> int:
    return min(most, max(16, int(triton.next_power_of_2(width))))


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return 99 * 1024
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@triton.jit
@no_type_check
def place(n_tiles, n_blocks, GROUP: tl.constexpr):
    """The tile of rows and the block of columns of this program: GROUP tiles in each column before the next column."""
    pid = tl.program_id(0)
    first = pid // (GROUP * n_blocks) * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = pid % (GROUP * n_blocks)
    return first + within % size, within // size


@triton.jit
@no_type_check
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc` + a @ b in fp32; the interpreter treats bf16 as integers, and products of bf16 are exact in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
@no_type_check
def product(
    acc,
    rows,
    row,
    row_ok,
    matrix,
    stride_in,
    stride_out,
    column,
    n_in,
    n_out,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc` + rows[row] @ matrix[:, column], in blocks of DEPTH of the n_in that are summed over."""
    for start in range(0, n_in, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        row_at = rows + row[:, None] * n_in + inner[None, :]
        matrix_at = matrix + inner[:, None] * stride_in + column[None, :] * stride_out
        a = tl.load(row_at, mask=row_ok[:, None] & (inner[None, :] < n_in), other=0.0)
        b = tl.load(matrix_at, mask=(inner[:, None] < n_in) & (column[None, :] < n_out), other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc
