"""The Mamba-2 recurrence in chunks on a CPU in C++, forward and backward. The README has the derivation and letters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.cpp import computes, dense, integers, is_bf16, library, views


def ssd_chunks(
    X: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " h"],
    chunk_size: int,
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """Computes H_t = exp(dt_t A) H_{t-1} + dt_t X_t B_t^T and Y_t = H_t C_t + D X_t in chunks; differentiable once.

    X, B and C are all fp32 or all bf16, and may be views whose last axis is dense. The others are converted to fp32.

    Args:
        chunk_size: number of positions of a chunk; the last may be shorter.
        state: state before the first position; None means zero.

    Returns:
        Outputs in the dtype of X, and the state after the last position in fp32.

    Raises:
        ValueError: a size, dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(X, B, C):
        found = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (X, B, C))
        raise ValueError(
            f"X, B and C must be on a CPU, all fp32 or (with AVX-512) bf16 with an even d_head and d_state; got {found}"
        )
    start = None if state is None else state.float().contiguous()
    small = dt.float().contiguous(), A.float().contiguous(), D.float().contiguous()
    outputs: tuple[Tensor, Tensor] = _Chunks.apply(  # type: ignore[no-untyped-call]
        _grouped(X), *small[:2], dense(B), dense(C), small[2], min(chunk_size, X.shape[1]), start
    )
    return outputs


def handles(X: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the kernel computes this recurrence on this machine."""
    return computes(X, B, C) and (X.dtype == torch.float32 or X.shape[3] % 2 == B.shape[3] % 2 == 0)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, q: int, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (b, seq, h, p), (g, n) = X.shape, B.shape[2:]
        ctx.sizes = integers(b, seq, g, h // g, p, n, q)
        Y, after = X.new_empty(X.shape), dt.new_empty(b, h, p, n)
        states = X.new_empty(b, g, -(-seq // q), n, h // g * p)
        ctx.save_for_backward(X, dt, A, B, C, D, states)
        ctx.with_state = state is not None
        ctx.set_materialize_grads(False)
        library().ssd_forward(
            is_bf16(X), ctx.sizes, _views(X, B, C, Y), views(dt, A, D, state, after, states, strides=())
        )
        return Y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor | None, dafter: Tensor | None) -> tuple[Tensor | None, ...]:
        X, dt, A, B, C, D, states = ctx.saved_tensors
        dY = X.new_zeros(X.shape) if dY is None else _grouped(dY)
        dafter = None if dafter is None else dafter.contiguous()
        dX, dB, dC = X.new_empty(X.shape), B.new_empty(B.shape), C.new_empty(C.shape)
        ddt, dA, dD = (torch.empty_like(dt) for _ in range(3))
        dbefore = dt.new_empty(X.shape[0], *X.shape[2:], B.shape[3]) if ctx.with_state else None
        many = _views(X, B, C, dY, dX, dB, dC)
        library().ssd_backward(
            is_bf16(X), ctx.sizes, many, views(dt, A, D, states, dafter, ddt, dA, dD, dbefore, strides=())
        )
        return dX, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), None, dbefore


def _grouped(x: Tensor) -> Tensor:
    """The tensor itself if the channels of all heads are adjacent, else a copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _views(X: Tensor, B: Tensor, C: Tensor, *others: Tensor) -> Any:
    """Each tensor by groups: the heads of a group are side by side in X, Y and their gradients."""
    g = B.shape[2]
    return views(*(x.unflatten(2, (g, -1)) for x in (X, B, C, *others)), strides=(0, 1, 2))
