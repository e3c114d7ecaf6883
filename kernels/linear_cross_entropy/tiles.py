"""The kernels: logits in registers, one tile at a time, and the products of their gradient.

Letters: H hidden (tokens, d_model), W weight (vocab_size, d_model), Z = H W^T the logits; dX the gradient of the loss
with respect to X.

`no_type_check` keeps import hooks from wrapping a kernel, whose annotations are only for Triton.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def tile_of_program(program, n_rows, n_columns, BAND: tl.constexpr):
    """Row and column of a program's tile: bands of BAND rows, each walked column by column.

    Programs that run together then share rows and columns in the L2 cache.
    """
    in_band = BAND * n_columns
    first = program // in_band * BAND
    height = tl.minimum(n_rows - first, BAND)
    return first + program % in_band % height, program % in_band // height


@triton.jit
@no_type_check
def multiply(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Returns `total` + a b. WIDEN is for Triton's interpreter, which multiplies the bits of bf16 as integers."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def logits_of_tile(
    H,
    W,
    row,
    column,
    tokens,
    vocab_size,
    d_model,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Logits (ROWS, COLUMNS) of one tile in fp32, zero outside of the matrix."""
    rows, columns, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    # Only the first address of a tile needs 64 bits; offsets inside a tile take half the registers.
    H += (row * ROWS).to(tl.int64) * d_model
    W += (column * COLUMNS).to(tl.int64) * d_model
    h_at = rows[:, None] * d_model + inner[None, :]
    w_at = columns[None, :] * d_model + inner[:, None]
    h_row = (row * ROWS + rows < tokens)[:, None]
    w_row = (column * COLUMNS + columns < vocab_size)[None, :]
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, d_model, INNER):
        inside = start + inner < d_model
        h = tl.load(H + h_at, mask=h_row & inside[None, :], other=0.0)
        w = tl.load(W + w_at, mask=w_row & inside[:, None], other=0.0)
        z = multiply(h, w, z, PRECISION, WIDEN)
        H += INNER
        W += INNER
    return z


@triton.jit
@no_type_check
def partial_lse_kernel(
    H,
    W,
    targets,
    partial_lse,
    target_logit,
    tokens,
    vocab_size,
    d_model,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes the logsumexp of each token's logits in one tile of the vocabulary, and the target's logit if it is there.

    partial_lse is (vocabulary tiles, tokens), so that neighbouring programs write to adjacent addresses.
    """
    row, column = tile_of_program(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(vocab_size, COLUMNS), BAND)
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_of_tile(H, W, row, column, tokens, vocab_size, d_model, ROWS, COLUMNS, INNER, PRECISION, WIDEN)
    z = tl.where((columns < vocab_size)[None, :], z, float("-inf"))
    peak = tl.max(z, axis=1)
    lse = peak + tl.log(tl.sum(tl.exp(z - peak[:, None]), axis=1))
    tl.store(partial_lse + column.to(tl.int64) * tokens + rows, lse, mask=rows < tokens)

    target = tl.load(targets + rows, mask=rows < tokens, other=-100)
    at_target = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
    end = tl.minimum(column * COLUMNS + COLUMNS, vocab_size)
    tl.store(target_logit + rows, at_target, mask=(target >= column * COLUMNS) & (target < end))


@triton.jit
@no_type_check
def combine_kernel(
    partial_lse,
    target_logit,
    targets,
    lse,
    losses,
    tokens,
    n_tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Online logsumexp over the tiles of the vocabulary; writes each token's lse and loss."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    scaled = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, n_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < n_tiles)[:, None] & (rows < tokens)[None, :]
        x = tl.load(partial_lse + tile.to(tl.int64)[:, None] * tokens + rows[None, :], mask=inside, other=float("-inf"))
        x = tl.where((rows < tokens)[None, :], x, 0.0)  # -inf - -inf would be NaN
        higher = tl.maximum(peak, tl.max(x, axis=0))
        scaled = scaled * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher[None, :]), axis=0)
        peak = higher
    total = peak + tl.log(scaled)
    tl.store(lse + rows, total, mask=rows < tokens)

    target = tl.load(targets + rows, mask=rows < tokens, other=-100)
    z = tl.load(target_logit + rows, mask=rows < tokens, other=0.0)
    tl.store(losses + rows, tl.where(target == -100, 0.0, total - z), mask=rows < tokens)


@triton.jit
@no_type_check
def logit_gradient_kernel(
    H,
    W,
    targets,
    lse,
    upstream,
    dZ,
    first_column,
    tokens,
    vocab_size,
    width,
    d_model,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes dZ = upstream (softmax - one-hot target) for the tokens and the part of the vocabulary given.

    first_column is the vocabulary index of column 0 of this part. A row of dZ has length `width` and is zero from
    vocab_size on.
    """
    row, column = tile_of_program(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.cdiv(width, COLUMNS), BAND)
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_of_tile(H, W, row, column, tokens, vocab_size, d_model, ROWS, COLUMNS, INNER, PRECISION, WIDEN)
    target = tl.load(targets + rows, mask=rows < tokens, other=-100)
    scale = tl.where(target == -100, 0.0, tl.load(upstream))
    softmax = tl.exp(z - tl.load(lse + rows, mask=rows < tokens, other=0.0)[:, None])
    hit = columns[None, :] == (target - first_column)[:, None]
    gradient = tl.where(hit, softmax - 1.0, softmax) * scale[:, None]
    gradient = tl.where((columns < vocab_size)[None, :], gradient, 0.0)
    dZ += (row * ROWS).to(tl.int64) * width + column * COLUMNS
    at = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    tl.store(dZ + at, gradient.to(dZ.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def product_kernel(
    A,
    B,
    before,
    out,
    n_rows,
    n_columns,
    n_inner,
    a_rows,
    a_terms,
    a_row,
    a_inner,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes out = A B, plus `before` where ADD; A has the strides a_row and a_inner, the others are contiguous.

    A is (a_rows, a_terms), padded with zeros beyond n_rows and n_inner: if these are not multiples of 16, a mask that
    ends there would prevent wide loads.
    """
    row, column = tile_of_program(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.cdiv(n_columns, COLUMNS), BAND)
    rows, columns, inner = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    A += (row * ROWS).to(tl.int64) * a_row
    B += column * COLUMNS
    a_at = rows[:, None] * a_row + inner[None, :] * a_inner
    b_at = inner[:, None] * n_columns + columns[None, :]
    a_inside = (row * ROWS + rows < a_rows)[:, None]
    b_inside = (column * COLUMNS + columns < n_columns)[None, :]
    first = (row * ROWS).to(tl.int64) * n_columns + column * COLUMNS
    at = rows[:, None] * n_columns + columns[None, :]
    inside = (row * ROWS + rows < n_rows)[:, None] & b_inside
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if ADD:  # before the loop, because after it the product occupies most registers
        total = tl.load(before + first + at, mask=inside, other=0.0)
    for start in range(0, n_inner, INNER):
        a = tl.load(A + a_at, mask=a_inside & (start + inner < a_terms)[None, :], other=0.0)
        b = tl.load(B + b_at, mask=b_inside & (start + inner < n_inner)[:, None], other=0.0)
        total = multiply(a, b, total, PRECISION, WIDEN)
        A += INNER * a_inner
        B += INNER * n_columns
    tl.store(out + first + at, total.to(out.dtype.element_ty), mask=inside)
