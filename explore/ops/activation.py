"""Non-linearities of MLPs and experts."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu2", "swiglu"]


def activate(
    up: Float[Tensor, "*dims d_ff"], gate: Float[Tensor, "*dims d_ff"] | None, activation: Activation
) -> Float[Tensor, "*dims d_ff"]:
    """Squared ReLU of `up` (no gate), or SwiGLU: SiLU(`gate`) times `up`."""
    if activation == "relu2":
        return F.relu(up).square()
    assert gate is not None
    return F.silu(gate) * up
