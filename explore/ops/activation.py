"""Non-linearities of MLPs and experts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["relu2", "swiglu", "swiglu_clamped"]
LIMIT, SHARPNESS = 7.0, 1.702
"""Clamping limit, and factor of the gate inside the sigmoid, of the clamped SwiGLU."""


def is_gated(activation: Activation) -> bool:
    """Whether the activation reads two projections, so that an MLP or expert has three matrices."""
    return activation != "relu2"


def activate(
    up: Float[Tensor, "*dims d_ff"], gate: Float[Tensor, "*dims d_ff"] | None, activation: Activation
) -> Float[Tensor, "*dims d_ff"]:
    """The inner values of an MLP or expert.

    - `relu2`: squared ReLU of `up`, without a gate (arXiv 2109.08668).
    - `swiglu`: SiLU(`gate`) times `up` (arXiv 2002.05202).
    - `swiglu_clamped`: gate * sigmoid(1.702 gate) * (up + 1), with `gate` clamped to at most 7 and `up` to [-7, 7]
      (GPT-OSS, arXiv 2508.10925).
    """
    if activation == "relu2":
        y: Tensor = _SquaredReLU.apply(up)  # type: ignore[no-untyped-call]
        return y
    assert gate is not None
    if activation == "swiglu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(SHARPNESS * gate) * (up + 1)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = _positive(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.addcmul(dy.new_zeros(()), positive, dy, value=2)  # one pass over memory


NEGATIVE_INFINITY = -128
"""The bits of minus infinity in bf16, interpreted as an integer."""


def _positive(x: Tensor) -> Tensor:
    """The ReLU of x; NaN stays NaN.

    On a CPU torch converts bf16 to fp32 and back, which takes longer than the memory traffic. So the bits are compared
    as integers: negative numbers are at most the bits of minus infinity; negative NaNs and all other values are above.
    """
    if not (x.is_cpu and x.dtype == torch.bfloat16):
        return F.relu(x)
    return F.threshold(x.view(torch.int16), NEGATIVE_INFINITY, 0).view(torch.bfloat16)
