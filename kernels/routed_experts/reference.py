"""A slow and simple reference, in any float dtype."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def reference(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    gate: Float[Tensor, "e d f"] | None,
    down: Float[Tensor, "e f d"],
    activation: str,
) -> Float[Tensor, "t d"]:
    """Applies one expert after another to the tokens that chose it."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, slot = (chosen == e).nonzero(as_tuple=True)
        h = activate(x[token] @ up[e], None if gate is None else x[token] @ gate[e], activation)
        y = y.index_add(0, token, weights[token, slot, None].to(x.dtype) * (h @ down[e]))
    return y


def activate(u: Tensor, g: Tensor | None, activation: str) -> Tensor:
    """Squared ReLU, SwiGLU (arXiv 2002.05202), or SwiGLU clamped as in GPT-OSS (arXiv 2508.10925)."""
    if g is None:
        return F.relu(u).square()
    if activation == "swiglu":
        return F.silu(g) * u
    g, u = g.clamp(max=7), u.clamp(-7, 7)
    return g * torch.sigmoid(1.702 * g) * (u + 1)
