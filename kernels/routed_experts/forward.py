"""Forward: activation(x up, x gate) over gathered rows, then the weighted product with `down`, one row per choice."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from explore.kernels.routed_experts.products import GROUP, dot, place, precision, product, tiles
from explore.kernels.routed_experts.routing import Routing

LIMIT, SHARPNESS = tl.constexpr(7.0), tl.constexpr(1.702)
"""Constants of the clamped SwiGLU."""


def outputs(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
    routing: Routing,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns the output, and what the backward pass needs besides the inputs.

    That is the activation's input; for `relu2` it is the output, since relu(u) is its root, so nothing more is written.

    Args:
        keep: whether there will be a backward pass.
    """
    n, (_, d, f) = len(routing.choice), up.shape
    h = x.new_empty(n, f)
    read = (x.new_empty(n, f), x.new_empty(n, f)) if keep and gate is not None else ()
    matrices = 1 if gate is None else 2
    size = tiles(routing.rows, f, d, x.dtype, x.device, matrices, held=matrices)
    n_blocks = triton.cdiv(f, size.columns)
    _inner[(len(routing.tile_expert) * n_blocks,)](
        x, up, gate, h, *(read or (None, None)), routing.token, routing.bounds, routing.tile_expert, routing.tile_row,
        len(routing.tile_expert), n_blocks, len(up), d, f,
        activation, routing.rows, size.columns, size.depth, GROUP, precision(x.dtype),
        **size.options(),
    )  # fmt: skip
    y = scatter(h, down, None, None, weights, routing, transposed=False)
    return y, (h,) if gate is None else read


def scatter(
    rows: Tensor,
    matrix: Tensor,
    more_rows: Tensor | None,
    more_matrix: Tensor | None,
    weights: Tensor | None,
    routing: Routing,
    transposed: bool,
) -> Tensor:
    """Sum over a token's choices of weight times (rows @ matrix + more_rows @ more_matrix) of the choice's expert.

    Each choice writes its own row, and the rows are added in order of the choices. Atomic additions would avoid writing
    and reading them, but their order, and so the result's last bits, would vary between calls.

    Args:
        rows: rows sorted by expert.
        transposed: whether the summed axis of the matrices is last in memory.
    """
    n, n_in = rows.shape
    n_out = matrix.shape[1] if transposed else matrix.shape[2]
    choices = rows.new_empty(n, n_out)
    size = tiles(routing.rows, n_out, n_in, rows.dtype, rows.device)
    n_blocks = triton.cdiv(n_out, size.columns)
    strides = (1, n_in) if transposed else (n_out, 1)
    _scatter[(len(routing.tile_expert) * n_blocks,)](
        rows, matrix, more_rows, more_matrix, weights, choices, *strides,
        routing.choice, routing.bounds, routing.tile_expert, routing.tile_row,
        len(routing.tile_expert), n_blocks, len(matrix), n_in, n_out,
        routing.rows, size.columns, size.depth, GROUP, precision(rows.dtype),
        **size.options(),
    )  # fmt: skip
    return choices.view(n // routing.top_k, routing.top_k, n_out).sum(1)


@triton.jit
@no_type_check
def activate(u, g, ACTIVATION: tl.constexpr):
    """The inner values; comparisons are written so that NaN stays NaN."""
    if ACTIVATION == "relu2":
        return tl.where(u < 0.0, 0.0, u * u)
    elif ACTIVATION == "swiglu":
        return g * tl.sigmoid(g) * u
    else:
        g = tl.where(g > LIMIT, LIMIT, g)
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
        return g * tl.sigmoid(g * SHARPNESS) * (u + 1.0)


@triton.jit
@no_type_check
def _inner(
    x, up, gate, h, u_kept, g_kept, token_of, bounds, tile_expert, tile_row, n_tiles, n_blocks, n_experts, d, f,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner values: activation(x[token] up, x[token] gate), both products in one pass over the gathered rows."""
    tile, block = place(n_tiles, n_blocks, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= n_experts:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
    row_ok = row < tl.load(bounds + expert + 1)
    token = tl.load(token_of + row, mask=row_ok, other=0).to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    matrix = expert.to(tl.int64) * d * f
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    g = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        a_at = x + token[:, None] * d + inner[None, :]
        a = tl.load(a_at, mask=row_ok[:, None] & (inner[None, :] < d), other=0.0)
        b_at = matrix + inner[:, None] * f + column[None, :]
        b_ok = (inner[:, None] < d) & (column[None, :] < f)
        u = dot(a, tl.load(up + b_at, mask=b_ok, other=0.0), u, PRECISION)
        if gate is not None:
            g = dot(a, tl.load(gate + b_at, mask=b_ok, other=0.0), g, PRECISION)
    at = row.to(tl.int64)[:, None] * f + column[None, :]
    ok = row_ok[:, None] & (column[None, :] < f)
    tl.store(h + at, activate(u, g, ACTIVATION), mask=ok)
    if u_kept is not None:
        tl.store(u_kept + at, u, mask=ok)
        tl.store(g_kept + at, g, mask=ok)


@triton.jit
@no_type_check
def _scatter(
    rows, matrix, more_rows, more_matrix, weights, choices, stride_in, stride_out,
    choice_of, bounds, tile_expert, tile_row, n_tiles, n_blocks, n_experts, n_in, n_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """choices[choice] = weight (rows @ matrix + more_rows @ more_matrix)."""
    tile, block = place(n_tiles, n_blocks, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= n_experts:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, ROWS)
    row_ok = row < tl.load(bounds + expert + 1)
    choice = tl.load(choice_of + row, mask=row_ok, other=0)
    row = row.to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    start = expert.to(tl.int64) * n_in * n_out
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = product(
        acc, rows, row, row_ok, matrix + start, stride_in, stride_out, column, n_in, n_out, DEPTH, PRECISION
    )  # fmt: skip
    if more_rows is not None:
        acc = product(
            acc, more_rows, row, row_ok, more_matrix + start, stride_in, stride_out, column, n_in, n_out, DEPTH,
            PRECISION,
        )  # fmt: skip
    if weights is not None:
        acc *= tl.load(weights + choice, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    at = choice.to(tl.int64)[:, None] * n_out + column[None, :]
    tl.store(choices + at, acc, mask=row_ok[:, None] & (column[None, :] < n_out))
