"""RMSNorm on a CPU in C++, plain or after a gate, forward and backward. The README has the letters."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from explore.kernels.cpp import computes, dense, integers, is_bf16, library, views

ROWS = 64
"""Rows of a block, as in the source."""


def rms_norm(
    x: Float[Tensor, "*dims c"],
    weight: Float[Tensor, " c"],
    eps: float,
    z: Float[Tensor, "*dims c"] | None = None,
    n_groups: int = 1,
) -> Float[Tensor, "*dims c"]:
    """Divides u by its root mean square in each group of channels and multiplies by `weight`; differentiable once.

    u is x, or x SiLU(z). x and z are both fp32 or both bf16; the weight, sums and the result before rounding are fp32.

    Raises:
        ValueError: a dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(x, z):
        found = ", ".join(f"{each.dtype} on {each.device}" for each in (x, z) if each is not None)
        raise ValueError(f"x and z must be on a CPU, both fp32 or (with AVX-512) both bf16, got {found}")
    y: Tensor = _Norm.apply(_rows(x), None if z is None else _rows(z), weight, n_groups, eps)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


def handles(x: Tensor, z: Tensor | None = None) -> bool:
    """Whether the kernel normalises these tensors on this machine."""
    return computes(*([x] if z is None else [x, z]))


def _rows(x: Tensor) -> Tensor:
    return dense(x.reshape(-1, x.shape[-1]))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        ctx.sizes = integers(len(x), n_groups, x.shape[1] // n_groups)
        w, y, r = _line(weight), x.new_empty(x.shape), x.new_empty(len(x), n_groups, dtype=torch.float32)
        ctx.save_for_backward(x, z, weight, r)
        tensors = views(x, z, w, y, r, strides=(0,))
        library().norm_forward(is_bf16(x), ctx.sizes, tensors, ctypes.byref(ctypes.c_double(eps)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, r = ctx.saved_tensors
        w, dy, dx, dz = _line(weight), dense(dy), x.new_empty(x.shape), None if z is None else z.new_empty(z.shape)
        dweight = x.new_empty(-(-len(x) // ROWS), x.shape[1], dtype=torch.float32)
        library().norm_backward(is_bf16(x), ctx.sizes, views(x, z, w, r, dy, dx, dz, dweight, strides=(0,)))
        return dx, dz, dweight.sum(0).to(weight.dtype), None, None


def _line(weight: Tensor) -> Tensor:
    return weight.float().contiguous()
