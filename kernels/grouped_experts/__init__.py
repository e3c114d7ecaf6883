"""Routed experts with squared ReLU on a CPU in C++, forward and backward. The README has the letters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.cpp import computes, dense, integers, is_bf16, library, views


def grouped_experts(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    down: Float[Tensor, "e f d"],
) -> Float[Tensor, "t d"]:
    """For each token, the sum over its chosen experts of weight times relu(x up)^2 down; differentiable once.

    x, up and down are all fp32 or all bf16; weights and sums are fp32. The choices are int64.

    Raises:
        ValueError: a size, dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(x, up, down):
        found = ", ".join(f"{each.dtype} {tuple(each.shape)} on {each.device}" for each in (x, up, down))
        raise ValueError(
            f"x, up and down must be on a CPU, all fp32 or (with AVX-512) bf16 with even widths; got {found}"
        )
    y: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        dense(x), chosen.contiguous(), weights.float().contiguous(), up.contiguous(), down.contiguous()
    )
    return y


def handles(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether the kernel computes these experts on this machine."""
    return computes(x, up, down) and (x.dtype == torch.float32 or up.shape[1] % 2 == up.shape[2] % 2 == 0)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        (t, k), (e, d, f) = chosen.shape, up.shape
        ctx.sizes = integers(t, k, e, d, f)
        first, order, row_of = chosen.new_empty(e + 1), chosen.new_empty(t * k), chosen.new_empty(t * k)
        rows, y = x.new_empty(t * k, d), x.new_empty(t, d)
        ctx.save_for_backward(x, weights, up, down, first, order, row_of)
        tensors = views(x, chosen, weights, up, down, first, order, row_of, rows, y, strides=(0,))
        library().experts_forward(is_bf16(x), ctx.sizes, tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, *sorting = ctx.saved_tensors
        dy, dx, dup, ddown = dense(dy), x.new_empty(x.shape), torch.empty_like(up), torch.empty_like(down)
        dweights, rows = torch.empty_like(weights), x.new_empty(weights.numel(), x.shape[1])
        tensors = views(x, weights, up, down, *sorting, dy, dx, dweights, dup, ddown, rows, strides=(0,))
        library().experts_backward(is_bf16(x), ctx.sizes, tensors)
        return dx, None, dweights, dup, ddown
