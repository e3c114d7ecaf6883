"""The order of the kernels, and the slices on which they run."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from explore.kernels.linear_cross_entropy.tiles import (
    combine_kernel,
    logit_gradient_kernel,
    partial_lse_kernel,
    product_kernel,
)

CHUNK_TOKENS = 8192
CHUNK_VOCAB = 8192
"""The largest slice of the logits' gradient that exists at once, in rows and columns."""


class Tiles(NamedTuple):
    """The tile of a product that one program computes: `rows` x `columns`, summing `inner` terms at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


H100_SHARED_BYTES = 227 * 1024
"""Shared memory that one program may use on an H100."""

BAND = 16
"""Number of rows of tiles that run together. With 8 columns they fill an H100 with a nearly square block of logits."""


def tiles_for(dtype: torch.dtype, precision: str, shared_bytes: int) -> Tiles:
    """Returns fixed tiles. They are not autotuned, because the order of a sum must not depend on timing.

    Args:
        shared_bytes: shared memory that one program may use; it holds `stages` slices of both operands.
    """
    if dtype == torch.bfloat16:
        return Tiles(128, 256, 64, 8, 3) if shared_bytes >= 160 * 1024 else Tiles(128, 128, 64, 8, 2)
    if precision == "tf32":
        return Tiles(128, 128, 32, 8, 3) if shared_bytes >= 160 * 1024 else Tiles(128, 128, 32, 8, 2)
    return Tiles(64, 64, 32, 8, 2)  # exact fp32 does not use tensor cores, so its operands take registers


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return bool(triton.knobs.runtime.interpret)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of the losses and the logsumexp of every token's logits. Inputs must be contiguous."""
    (tokens, d_model), vocab_size = hidden.shape, weight.shape[0]
    tiles, how = _launch(hidden)
    n_tiles = triton.cdiv(vocab_size, tiles.columns)
    partial_lse = _empty_fp32(hidden, n_tiles, tokens)
    lse, losses = _empty_fp32(hidden, tokens), _empty_fp32(hidden, tokens)
    target_logit = torch.full_like(lse, torch.nan)  # stays NaN if a target is outside the vocabulary
    if tokens:
        with torch.cuda.device_of(hidden):
            partial_lse_kernel[(triton.cdiv(tokens, tiles.rows) * n_tiles,)](
                hidden, weight, targets, partial_lse, target_logit, tokens, vocab_size, d_model, **how
            )
            combine_kernel[(triton.cdiv(tokens, 32),)](
                partial_lse,
                target_logit,
                targets,
                lse,
                losses,
                tokens,
                n_tiles,
                ROWS=32,
                TILES=64,
                enable_fp_fusion=True,
            )
    return losses.sum(), lse


def backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of `hidden` and `weight`, each if needed, by slices of the gradient of the logits."""
    tokens, vocab_size = hidden.shape[0], weight.shape[0]
    if not tokens:
        return torch.zeros_like(hidden), torch.zeros_like(weight)
    upstream = upstream.contiguous()
    token_slices, vocab_slices = _slices(tokens, CHUNK_TOKENS), _slices(vocab_size, CHUNK_VOCAB)
    buffer_numel = min(tokens, CHUNK_TOKENS) * _padded(min(vocab_size, CHUNK_VOCAB))
    buffer = torch.empty(buffer_numel, dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((hidden, weight), needed, strict=True)
    )
    # Terms are summed in fp32: in the gradient itself if it is fp32 or if there is only one term.
    fp32 = hidden.dtype == torch.float32
    hidden_sum, weight_sum = d_hidden, None
    if d_hidden is not None and not fp32 and len(vocab_slices) > 1:
        hidden_sum = _empty_fp32(hidden, *hidden.shape)
    if d_weight is not None and not fp32 and len(token_slices) > 1:
        weight_sum = _empty_fp32(weight, min(vocab_size, CHUNK_VOCAB), weight.shape[1])
    with torch.cuda.device_of(hidden):
        for j, v in enumerate(vocab_slices):
            w = weight[v]
            for i, t in enumerate(token_slices):
                h = hidden[t]
                dz = buffer[: len(h) * _padded(len(w))].view(len(h), -1)
                _logit_gradient(h, w, targets[t], lse[t], upstream, v.start, dz)
                if d_hidden is not None and hidden_sum is not None:
                    _add_product(dz, w, hidden_sum[t], d_hidden[t], first=j == 0, last=j == len(vocab_slices) - 1)
                if d_weight is not None:
                    total = d_weight[v] if weight_sum is None else weight_sum[: len(w)]
                    _add_product(dz.T, h, total, d_weight[v], first=i == 0, last=i == len(token_slices) - 1)
    return d_hidden, d_weight


def _empty_fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _padded(length: int) -> int:
    """Rounds up to a multiple of 16, which Triton needs for wide loads."""
    return -(-length // 16) * 16


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logit_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, first_column: int, out: Tensor
) -> None:
    tiles, how = _launch(hidden)
    (tokens, d_model), vocab_size, width = hidden.shape, weight.shape[0], out.shape[1]
    grid = (triton.cdiv(tokens, tiles.rows) * triton.cdiv(width, tiles.columns),)
    logit_gradient_kernel[grid](
        hidden, weight, targets, lse, upstream, out, first_column, tokens, vocab_size, width, d_model, **how
    )


def _add_product(a: Tensor, b: Tensor, total: Tensor, out: Tensor, *, first: bool, last: bool) -> None:
    """Adds the term a b to the sum in `total`; writes it to `out` after the last term.

    `a` may be padded with zeros beyond the rows of `out` and the terms of `b`.
    """
    tiles, how = _launch(a)
    (n_rows, n_columns), n_inner = out.shape, b.shape[0]
    grid = (triton.cdiv(n_rows, tiles.rows) * triton.cdiv(n_columns, tiles.columns),)
    out = out if last else total
    product_kernel[grid](a, b, total, out, n_rows, n_columns, n_inner, *a.shape, *a.stride(), ADD=not first, **how)


@cache
def _shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return H100_SHARED_BYTES
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def _launch(operand: Tensor) -> tuple[Tiles, dict[str, int | str | bool]]:
    """Returns the tiles and the keyword arguments of a kernel that multiplies operands like this one."""
    # fp32 products follow torch's precision setting; bf16 has only one precision.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tiles = tiles_for(operand.dtype, precision, _shared_bytes(operand.device))
    return tiles, {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "BAND": BAND,
        "PRECISION": precision,
        "WIDEN": interpreted(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # explicit, since fp32 products need it and Triton's default will change
    }
