"""Routed experts: every token goes to its chosen experts, and none is dropped.

Shapes: t tokens, k top_k, e n_experts, d width that experts read and write, f d_expert.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.ops.activation import Activation, activate


def experts(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    gate: Float[Tensor, "e d f"] | None,
    down: Float[Tensor, "e f d"],
    activation: Activation,
    biases: tuple[Float[Tensor, "e f"], Float[Tensor, "e f"] | None, Float[Tensor, "e d"]] | None = None,
) -> Float[Tensor, "t d"]:
    """Sum over the chosen experts of weight times expert(x), one expert after another.

    Tokens are sorted by expert, so that each expert's matrix products are exactly as large as its load.

    Args:
        biases: of `up`, `gate` and `down`.
    """
    k = chosen.shape[1]
    n_experts = up.shape[0]
    expert_of = chosen.flatten()
    order = expert_of.argsort(stable=True)
    load = expert_of.bincount(minlength=n_experts).tolist()
    token_of = order // k
    outputs = []
    for e, tokens in enumerate(x[token_of].split(load)):
        if load[e]:
            inner, gated = tokens @ up[e], None if gate is None else tokens @ gate[e]
            if biases is not None:
                inner = inner + biases[0][e]
                gated = None if gated is None or biases[1] is None else gated + biases[1][e]
            y = activate(inner, gated, activation) @ down[e]
            outputs.append(y if biases is None else y + biases[2][e])
    y = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token_of, y)
