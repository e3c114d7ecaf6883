"""Routed experts: every token goes to its chosen experts, and none is dropped.

Shapes: t tokens, k top_k, e n_experts, d width that experts read and write, f d_expert.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.ops.activation import Activation, activate
from explore.ops.paths import path_of

MAX_PADDING = 4
"""Rows of the padded form over those that hold a token."""


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
    """Sum over the chosen experts of weight times expert(x), by the path in use.

    Args:
        biases: of `up`, `gate` and `down`.
    """
    path = {"loop": _loop, "padded": _padded, "dense": _dense}[path_of("experts", x.device.type)]
    return path(x, chosen, weights, up, gate, down, activation, biases)


def _loop(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor | None, Tensor] | None,
) -> Tensor:
    """One expert after another, the tokens sorted by expert: its products are exactly as large as its load."""
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


def _padded(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor | None, Tensor] | None,
) -> Tensor:
    """All experts in one batch of products, each padded to the load of the busiest; no token is dropped.

    More work than `_loop` by the busiest load over the mean, in far fewer and larger products; where that is too
    much, or there are too few tokens for the experts, it is left to `_loop`.
    """
    (t, k), n_experts = chosen.shape, up.shape[0]
    expert_of = chosen.flatten()
    load = expert_of.bincount(minlength=n_experts)
    capacity = int(load.max())
    if capacity * n_experts > MAX_PADDING * t * k:
        return _loop(x, chosen, weights, up, gate, down, activation, biases)
    order = expert_of.argsort(stable=True)
    start = load.cumsum(0) - load  # of each expert in the sorted order
    sorted_expert = expert_of[order]
    slot = sorted_expert * capacity + torch.arange(t * k, device=x.device) - start[sorted_expert]
    token_of = order // k
    rows = x.new_zeros(n_experts * capacity, x.shape[1]).index_copy(0, slot, x[token_of])
    rows = rows.view(n_experts, capacity, -1)
    y = _expert_mlp(rows, up, gate, down, activation, biases)
    y = y.flatten(0, 1)[slot] * weights.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token_of, y)


def _dense(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor | None, Tensor] | None,
) -> Tensor:
    """Every expert computes every token, and those that were not chosen have weight zero.

    Exact, at n_experts / top_k times the work; no shape depends on data, so that a graph can be exported whole.
    """
    y = _expert_mlp(x[None].expand(up.shape[0], -1, -1), up, gate, down, activation, biases)  # e t d
    weight = x.new_zeros(x.shape[0], up.shape[0]).scatter_add(1, chosen, weights.to(x.dtype))  # t e
    return torch.einsum("te,etd->td", weight, y)


def _expert_mlp(
    rows: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor | None, Tensor] | None,
) -> Tensor:
    """Every expert over its own rows: (e, rows, d) in, the same out."""
    inner, gated = torch.bmm(rows, up), None if gate is None else torch.bmm(rows, gate)
    if biases is not None:
        inner = inner + biases[0][:, None]
        gated = None if gated is None or biases[1] is None else gated + biases[1][:, None]
    y = torch.bmm(activate(inner, gated, activation), down)
    return y if biases is None else y + biases[2][:, None]
