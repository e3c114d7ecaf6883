"""RMS normalisation, plain and gated, and normalisation to unit length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.compilation import or_uncompiled
from explore.ops.paths import OpPath, declare, path_of

NORMS = (
    OpPath("by_hand", default_on="any"),
    OpPath("eager", reference=True, countable=True),
    OpPath("compiled", compiled=True),
)
declare("norm", *NORMS)
declare("gated_norm", *NORMS)


def rms_norm(
    x: Float[Tensor, "*dims width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*dims width"]:
    """RMSNorm, x / sqrt(mean(x^2) + eps) times `weight`, in the dtype of `weight`. The result has the dtype of `x`.

    Source: arXiv 1910.07467.
    """
    path = path_of("norm", x.device.type)
    if not (torch.is_grad_enabled() and x.is_cpu) or path == "eager":
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return _norm_kernel()(x, weight, eps) if path == "compiled" else _by_hand(x, weight, eps)


def _by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = _RMSNorm.apply(x.to(weight.dtype), weight, eps)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


@cache
def _norm_kernel() -> Callable[[Tensor, Tensor, float], Tensor]:
    """The C++ kernel, with `_by_hand` in its place where the compiler fails or the kernel cannot handle x."""
    from explore.kernels.rms_norm import handles
    from explore.kernels.rms_norm import rms_norm as kernel

    def fast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (kernel if handles(x) else _by_hand)(x, weight, eps)

    return or_uncompiled(fast, _by_hand)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean(x^2) + eps)^(-1/2). Only x, r and w are saved.

    With v = w dy: dx = r v - x r^3 mean(x v). The backward pass of layer normalisation, with a mean of 0, computes
    dx - r mean(v) in one loop. Then r mean(v) is added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _scale(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        width, zero, needed = weight.shape, torch.zeros_like(r), [True, True, False]
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(dy, x, width, zero, r, weight, None, needed)
        with torch.autocast("cpu", enabled=False):
            total = (dy @ weight).unsqueeze(-1)
        return dx.addcmul_(total, r, value=1 / x.shape[-1]), dweight, None


def l2_norm(x: Float[Tensor, "*dims width"], eps: float, scale: float = 1.0) -> Float[Tensor, "*dims width"]:
    """Returns `scale` times x / sqrt(sum(x^2) + eps), computed in at least fp32 and returned in the dtype of `x`.

    This is RMSNorm with eps / width and the weight scale / sqrt(width).
    """
    width = x.shape[-1]
    exact = x.float() if x.dtype.itemsize < 4 else x
    return rms_norm(exact, exact.new_full((width,), scale * width**-0.5), eps / width).to(x.dtype)


def rms_norm_before_gate(
    x: Float[Tensor, "*dims width"], z: Float[Tensor, "*dims width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*dims width"]:
    """Normalises `x` (RMSNorm), then multiplies by SiLU(`z`). `gated_group_rms_norm` multiplies by the gate first.

    It computes in the dtype of `weight`; the result has the dtype of `x`.
    """
    return (rms_norm(x.to(weight.dtype), weight, eps) * F.silu(z.to(weight.dtype))).to(x.dtype)


def gated_group_rms_norm(
    x: Float[Tensor, "batch seq d_inner"],
    z: Float[Tensor, "batch seq d_inner"],
    weight: Float[Tensor, " d_inner"],
    n_groups: int,
    eps: float,
) -> Float[Tensor, "batch seq d_inner"]:
    """Gates `x` with SiLU(`z`) first, then normalises within each of `n_groups` groups of channels."""
    path = path_of("gated_norm", x.device.type)
    norm = _gated_norm if path == "eager" else _gated_kernel() if path == "compiled" else _gated_by_hand
    return norm(x, z, weight, n_groups, eps)


@cache
def _gated_kernel() -> Callable[[Tensor, Tensor, Tensor, int, float], Tensor]:
    """The C++ kernel, with `_gated_by_hand` where the compiler fails or the kernel cannot handle x and z."""
    from explore.kernels.rms_norm import handles
    from explore.kernels.rms_norm import rms_norm as kernel

    def fast(x: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        if not handles(x, z):
            return _gated_by_hand(x, z, weight, n_groups, eps)
        return kernel(x, weight, eps, z, n_groups)

    return or_uncompiled(fast, _gated_by_hand)


def _gated_by_hand(x: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    y: Tensor = _GatedNorm.apply(x, z, weight, n_groups, eps)  # type: ignore[no-untyped-call]
    return y


def _gated_norm(x: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    u = _groups(x.float() * F.silu(z.float()), n_groups)
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)
    y: Tensor = u.flatten(-2) * weight
    return y.to(x.dtype)


class _GatedNorm(torch.autograd.Function):
    """y = u r w within each group, with u = x SiLU(z) and r = (mean(u^2) + eps)^(-1/2).

    Only the inputs and r are saved; the backward pass recomputes u. With v = w dy: du = r v - u r^3 mean(u v).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
        u = _groups(x.float() * F.silu(z.float()), n_groups)
        r = _scale(u, eps)
        ctx.save_for_backward(x, z, weight, r)
        return u.mul_(r).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, r = ctx.saved_tensors
        n_groups, dy, exact = r.shape[-2], dy.float(), z.float()
        sigmoid = exact.sigmoid()
        gate = exact * sigmoid
        u, du = _groups(x.float() * gate, n_groups), _groups(dy * weight, n_groups)
        shrunk = (u * du).sum(-1, keepdim=True) / u.shape[-1] * r**3
        du = du.mul_(r).addcmul_(u, shrunk, value=-1).flatten(-2)
        dz = (1 - sigmoid).mul_(gate).add_(sigmoid).mul_(du).mul_(x)
        dweight = u.mul_(r).flatten(-2).mul_(dy).sum(tuple(range(dy.ndim - 1)))
        return du.mul_(gate).to(x.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None


def _scale(x: Tensor, eps: float) -> Tensor:
    """Returns (mean(x^2) + eps)^(-1/2) without storing the squares."""
    return torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)


def _groups(x: Tensor, n_groups: int) -> Tensor:
    groups: Tensor = x.unflatten(-1, (n_groups, -1))
    return groups
