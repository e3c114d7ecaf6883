"""Routed experts: every token goes to its chosen experts, and none is dropped.

Shapes: t tokens, k top_k, e n_experts, d width that experts read and write, f d_expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.activation import Activation, activate
from explore.ops.linear import linear
from explore.ops.paths import OpPath, declare, path_of, product_dtype

declare(
    "experts",
    OpPath("padded", default_on="any"),
    OpPath("loop", reference=True, countable=True),
    OpPath("dense", decoding=True),
    OpPath("triton", default_on="cuda", needs="triton"),
)


MAX_PADDING = 4
"""Rows of the padded form over those that hold a token."""

EVEN = 1.33
"""Load of the busiest expert over the mean, up to which all experts are padded to it."""

BATCHES = 5
"""Parts in which experts of uneven loads are padded, so that a few of them do not set the size of all."""

CAPACITIES = 8
"""Sizes of a padded expert within one mean load: a product in bf16 is compiled anew for each size that it meets."""

FEW = 16
"""Choices of an expert, on average, up to which a decoded batch is padded in any precision."""


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
    dtype = product_dtype(x)
    x, up, down, gate = x.to(dtype), up.to(dtype), down.to(dtype), None if gate is None else gate.to(dtype)
    name = path_of("experts", x.device.type)
    if name == "triton" and biases is None:
        from explore.kernels.routed_experts import routed_experts

        return routed_experts(x, chosen, weights, up, gate, down, activation)
    path = {"loop": _loop, "dense": _dense}.get(name, _padded)
    offsets = (None if bias is None else bias.to(dtype) for bias in biases or (None, None, None))
    return path(x, chosen, weights, _Experts(activation, up, gate, down, *offsets))


class _Experts(NamedTuple):
    """Weights of all experts, experts first."""

    activation: Activation
    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each expert over its own rows, as many for all: (e, rows, d)."""
    y = rows @ weight
    return y if bias is None else y + bias.unsqueeze(-2)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _inner(mlp: _Experts, rows: Tensor, product: Product = _product) -> Tensor:
    gated = None if mlp.gate is None else product(rows, mlp.gate, mlp.gate_bias)
    return activate(product(rows, mlp.up, mlp.up_bias), gated, mlp.activation)


def _run(mlp: _Experts, rows: Tensor, product: Product = _product) -> Tensor:
    return product(_inner(mlp, rows, product), mlp.down, mlp.down_bias)


def _loop(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """One expert after another, the tokens sorted by expert: its products are exactly as large as its load."""
    row_of, load = _sorted(chosen, len(mlp.up))
    loads = load.tolist()
    expert_of = torch.arange(len(load), device=x.device).repeat_interleave(load)  # of each row

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Grouped.apply(rows, weight, loads)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias[expert_of]

    return _combined(_run(mlp, _dispatched(x, row_of, chosen.numel()), product), weights, row_of)


class _Grouped(torch.autograd.Function):
    """Rows, sorted by expert, times the weight of each: products that write where their results belong."""

    @staticmethod
    def forward(
        ctx: Any, rows: Float[Tensor, "choices d"], weight: Float[Tensor, "e d f"], loads: list[int]
    ) -> Float[Tensor, "choices f"]:
        ctx.save_for_backward(rows, weight)
        ctx.loads = loads
        y = rows.new_empty(len(rows), weight.shape[2])
        for into, tokens, one in zip(y.split(loads), rows.split(loads), weight, strict=True):
            torch.mm(tokens, one, out=into)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        drows, dweight = torch.empty_like(rows), torch.empty_like(weight)
        parts = (each.split(ctx.loads) for each in (rows, drows, dy))
        for tokens, dtokens, given, one, done in zip(*parts, weight, dweight, strict=True):
            torch.mm(given, one.T, out=dtokens)
            torch.mm(tokens.T, given, out=done)
        return drows, dweight, None


def _padded(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """All experts in one batch of products, or a few of them by load, each padded to its busiest; no token is dropped.

    More work than `_loop` by the busiest load over the mean, in far fewer and larger products; where that is too
    much, or there are too few tokens for the experts, it is left to `_loop`. So it is in fp32 on a CPU, where a
    batch of large products is no faster than one after another. The few rows of decoding are padded all the same,
    unless most experts would be read in vain.
    """
    n_experts = len(mlp.up)
    few = not torch.is_grad_enabled() and n_experts <= 2 * chosen.numel() <= 2 * FEW * n_experts
    if x.is_cpu and x.dtype == torch.float32 and not few:
        return _loop(x, chosen, weights, mlp)
    sorted_row_of, load = _sorted(chosen, n_experts)
    grain = max(1, chosen.numel() // n_experts // CAPACITIES)
    even = few or int(load.max()) * n_experts <= EVEN * chosen.numel()
    by_load = torch.arange(n_experts, device=x.device) if even else load.argsort()
    sizes = [n_experts] if even else _sizes(n_experts)
    capacities = [-(-int(part.max()) // grain) * grain for part in load[by_load].split(sizes)]
    n_rows = [size * capacity for size, capacity in zip(sizes, capacities, strict=True)]
    if sum(n_rows) > MAX_PADDING * chosen.numel() and not few:
        return _loop(x, chosen, weights, mlp)
    capacity = torch.tensor(capacities, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
    first_row = torch.empty_like(load).scatter_(0, by_load, capacity.cumsum(0) - capacity)  # of each expert
    row_of = sorted_row_of + (first_row - (load.cumsum(0) - load))[chosen]
    batches = [mlp] if even else _batches(mlp, by_load, sizes)
    rows = _dispatched(x, row_of, sum(n_rows)).split(n_rows)
    outputs = [
        _run(batch, part.unflatten(0, (len(batch.up), -1))).flatten(0, 1)
        for batch, part in zip(batches, rows, strict=True)
    ]
    return _combined(outputs[0] if even else torch.cat(outputs), weights, row_of)


def _sizes(n_experts: int) -> list[int]:
    """How many experts each batch has: half of them, half of the others, and so on."""
    sizes: list[int] = []
    while len(sizes) < BATCHES - 1 and (half := (n_experts - sum(sizes)) // 2):
        sizes.append(half)
    return [*sizes, n_experts - sum(sizes)]


def _batches(mlp: _Experts, by_load: Tensor, sizes: list[int]) -> list[_Experts]:
    parts: list[Any] = [
        [None] * len(sizes) if part is None else part.index_select(0, by_load).split(sizes) for part in mlp[1:]
    ]
    return [_Experts(mlp.activation, *each) for each in zip(*parts, strict=True)]


def _dense(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """Every expert computes every token, and those that were not chosen have weight zero.

    Exact, at n_experts / top_k times the work; no shape depends on data, so that a graph can be exported whole.
    The weights go to the inner values, so that one product over all experts adds up what they give.
    """
    n_experts = len(mlp.up)
    weight = x.new_zeros(x.shape[0], n_experts).scatter_add(1, chosen, weights.to(x.dtype))  # t e
    inner = _inner(mlp, x[None].expand(n_experts, -1, -1))  # e t f
    weighted = (weight.T[..., None] * inner).transpose(0, 1).flatten(1)
    y = linear(weighted, mlp.down.flatten(0, 1).T)
    return y if mlp.down_bias is None else y + weight @ mlp.down_bias


def _sorted(chosen: Int[Tensor, "t k"], n_experts: int) -> tuple[Int[Tensor, "t k"], Int[Tensor, " e"]]:
    """The row of each choice where choices are sorted by expert, and how many each expert has."""
    expert_of = chosen.flatten()
    order = expert_of.argsort(stable=True)
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return row_of.view_as(chosen), expert_of.bincount(minlength=n_experts)


def _dispatched(x: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    rows: Tensor = _Dispatch.apply(x, row_of, n_rows)  # type: ignore[no-untyped-call]
    return rows


def _combined(outputs: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    y: Tensor = _Combine.apply(outputs, weights.to(outputs.dtype), row_of)  # type: ignore[no-untyped-call]
    return y


class _Dispatch(torch.autograd.Function):
    """Copies every token to its rows, one for each choice, and leaves the others zero.

    Bags of embeddings are what torch gathers and adds up in one pass, with many threads; what autograd does for an
    index adds up row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "t d"], row_of: Int[Tensor, "t k"], n_rows: int) -> Float[Tensor, "rows d"]:
        ctx.save_for_backward(row_of)
        return _placed(x, torch.ones_like(row_of, dtype=x.dtype), row_of, n_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (row_of,) = ctx.saved_tensors
        return F.embedding_bag(row_of, drows, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """Adds up what a token's rows hold, each times its weight."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Float[Tensor, "rows d"], weights: Float[Tensor, "t k"], row_of: Int[Tensor, "t k"]
    ) -> Float[Tensor, "t d"]:
        ctx.save_for_backward(outputs, weights, row_of)
        return F.embedding_bag(row_of, outputs, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights, row_of = ctx.saved_tensors
        dweights = (F.embedding(row_of, outputs) * dy[:, None]).sum(-1)
        return _placed(dy, weights, row_of, len(outputs)), dweights, None


def _placed(
    x: Float[Tensor, "t d"], weights: Float[Tensor, "t k"], row_of: Int[Tensor, "t k"], n_rows: int
) -> Float[Tensor, "rows d"]:
    """Of every row its token times its weight, and zero where it has none."""
    rows, token = row_of.flatten(), torch.arange(len(x), device=x.device)
    token_of = rows.new_zeros(n_rows).scatter_(0, rows, token.repeat_interleave(row_of.shape[1]))
    weight_of = weights.new_zeros(n_rows).scatter_(0, rows, weights.flatten())
    return F.embedding_bag(token_of[:, None], x, mode="sum", per_sample_weights=weight_of[:, None])
