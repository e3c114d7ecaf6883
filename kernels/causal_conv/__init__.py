"""Causal depthwise convolution on a CPU in C++, forward and backward. The README has the letters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.cpp import computes, dense, integers, is_bf16, library, views

ROWS, MAX_TAPS = 64, 4
"""Positions of a block, and the largest number of taps, as in the source."""


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c 1 k"],
    bias: Float[Tensor, " c"] | None,
    silu: bool = False,
) -> Float[Tensor, "b l c"]:
    """Convolves each channel with its own filter over the last k positions; differentiable once.

    x is fp32 or bf16 and may be a view whose last axis is dense; filters and sums are fp32.

    Args:
        silu: whether the sum goes through SiLU.

    Raises:
        ValueError: a size, dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(x, weight):
        raise ValueError(
            f"x must be on a CPU, in fp32 or (with AVX-512) bf16, with at most {MAX_TAPS} taps; "
            f"got {x.dtype} on {x.device}, {weight.shape[2]} taps"
        )
    y: Tensor = _Conv.apply(dense(x), weight, bias, silu)  # type: ignore[no-untyped-call]
    return y


def handles(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes this convolution on this machine."""
    return computes(x) and weight.shape[2] <= MAX_TAPS


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        (b, seq, c), k = x.shape, weight.shape[2]
        ctx.sizes = integers(b, seq, c, k, silu)
        ctx.save_for_backward(x, weight, bias)
        filters, y = _filters(weight, bias), x.new_empty(x.shape)
        library().conv_forward(is_bf16(x), ctx.sizes, views(x, *filters, y, strides=(0, -2)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        (b, seq, c), k = x.shape, weight.shape[2]
        dx, dtaps = x.new_empty(x.shape), x.new_empty(b * -(-seq // ROWS), k + 1, c, dtype=torch.float32)
        filters, dy = _filters(weight, bias), dense(dy)
        tensors = views(x, *filters, dy, dx, dtaps, strides=(0, -2))
        library().conv_backward(is_bf16(x), ctx.sizes, tensors)
        dtaps = dtaps.sum(0).to(weight.dtype)
        return dx, dtaps[:k].T.unsqueeze(1), None if bias is None else dtaps[k].to(bias.dtype), None


def _filters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Taps as (k, c), and the bias as (1, c), in fp32."""
    return weight[:, 0].T.float().contiguous(), None if bias is None else bias.float().contiguous().unsqueeze(0)
