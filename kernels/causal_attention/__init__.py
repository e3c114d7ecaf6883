"""Causal attention on a CPU in C++, forward and backward. The derivation, with all letters, is in the README."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.cpp import computes, dense, integers, is_bf16, library, views


def causal_attention(
    q: Float[Tensor, "b h l d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h l e"]:
    """Computes softmax(Q K^T / sqrt(d)) V for queries that are the last l of n positions; differentiable once.

    q, k and v are all fp32 or all bf16. Sums and the softmax are fp32.

    Args:
        window: maximum number of positions that a query sees, including its own; None is unlimited.
        sinks: one logit per head that is part of the softmax but has no value.

    Returns:
        Outputs in the dtype of v, in memory as (b, l, h, e).

    Raises:
        ValueError: a size, dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(q, k, v):
        raise ValueError(
            "q, k and v must be on a CPU, all fp32 or (with AVX-512) bf16 with an even number of channels; got "
            + ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
        )
    q, k, v = dense(q), dense(k), dense(v)
    y: Tensor = _Attention.apply(q, k, v, window, sinks)  # type: ignore[no-untyped-call]
    return y


def handles(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes attention of these tensors on this machine."""
    return computes(q, k, v) and (q.dtype == torch.float32 or q.shape[3] % 2 == v.shape[3] % 2 == 0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        (b, h, queries, d), (_, g, keys, e) = q.shape, v.shape
        y = q.new_empty(b, queries, h, e).transpose(1, 2)
        logsum = q.new_empty(b, h, queries, 1, dtype=torch.float32)
        ctx.sizes = integers(b, g, h // g, queries, keys, d, e, window or 0)
        ctx.save_for_backward(q, k, v, y, logsum, sinks)
        logits = None if sinks is None else sinks.float().contiguous()
        tensors = views(q, k, v, y, logsum, strides=(0, 1, 2))
        library().attention_forward(is_bf16(q), ctx.sizes, tensors, views(logits, strides=()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsum, sinks = ctx.saved_tensors
        dy = dense(dy)
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, logsum))
        tensors = views(q, k, v, y, logsum, dy, delta, dq, dk, dv, strides=(0, 1, 2))
        library().attention_backward(is_bf16(q), ctx.sizes, tensors)
        if sinks is None:
            return dq, dk, dv, None, None
        # A sink has no value, so dP is zero there, and dS = P (0 - delta).
        weights = (sinks.float().view(-1, 1, 1) - logsum).exp()
        return dq, dk, dv, None, -(weights * delta).sum((0, 2, 3)).to(sinks.dtype)
