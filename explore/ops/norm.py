"""Gated RMS normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from explore.ops.paths import compiled, path_of


def gated_group_rms_norm(
    x: Float[Tensor, "batch seq d_inner"],
    z: Float[Tensor, "batch seq d_inner"],
    weight: Float[Tensor, " d_inner"],
    n_groups: int,
    eps: float,
) -> Float[Tensor, "batch seq d_inner"]:
    """Gates `x` with SiLU(`z`) first, then normalises within each of `n_groups` groups of channels."""
    norm = compiled(_gated_norm) if path_of("norm", x.device.type) == "compiled" else _gated_norm
    return norm(x, z, weight, n_groups, eps)


def _gated_norm(x: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    gated = x.float() * F.silu(z.float())
    groups = gated.unflatten(-1, (n_groups, -1))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    normed: Tensor = groups.flatten(-2) * weight
    return normed.to(x.dtype)
