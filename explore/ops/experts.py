"""Routed experts: every token goes to its chosen experts, and none is dropped.

Shapes: t tokens, k top_k, e n_experts, d width that experts read and write, f d_expert.

A choice is a pair of a token and one of its chosen experts; there are t*k of them. Every path except `_dense` works in
three steps. It copies the token of each choice to a row, so that the rows of an expert are adjacent. It multiplies the
rows by the weights of their expert. It adds up the rows of each token. `row_of` (t k) holds the row of each choice,
which is enough for the copy and for the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.activation import Activation, activate
from explore.ops.compilation import or_uncompiled
from explore.ops.grouped import grouped_outer, grouped_product
from explore.ops.linear import linear
from explore.ops.low_precision import Layout, Quantizer
from explore.ops.paths import OpPath, declare, path_of, product_dtype

declare(
    "experts",
    OpPath("padded", default_on="any"),
    OpPath("loop", reference=True, countable=True),
    OpPath("dense", decoding=True),
    OpPath("triton", default_on="cuda", needs="triton"),
    OpPath("compiled", compiled=True),
)


MAX_PADDING = 4
"""Maximum ratio of padded rows to rows that hold a token. Above it, experts run one after another."""

EVEN = 1.33
"""Maximum ratio of the largest load to the mean load at which all experts are padded to the largest load."""

BATCHES = 5
"""Number of batches for experts of uneven loads. Each has its own capacity, so a few busy experts do not pad all."""

CAPACITIES = 8
"""Number of possible capacities per mean load. There are few, because each new size compiles a bf16 product."""

FEW = 16
"""Maximum mean load at which a decoding batch is padded in any precision."""


def experts(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    gate: Float[Tensor, "e d f"] | None,
    down: Float[Tensor, "e f d"],
    activation: Activation,
    biases: tuple[Float[Tensor, "e f"], Float[Tensor, "e f"] | None, Float[Tensor, "e d"]] | None = None,
    quantizer: Quantizer | None = None,
    n_sequences: int = 1,
) -> Float[Tensor, "t d"]:
    """For each token x, the sum over its chosen experts of weight times expert(x), by the selected path.

    Args:
        biases: biases of `up`, `gate` and `down`.
        quantizer: quantiser of the operands of all products.
        n_sequences: number of sequences of equal length in `x`; only the quantiser needs it.
    """
    if quantizer is not None and not quantizer.emulation.is_off:
        mlp = _Experts(activation, up, gate, down, *(biases or (None, None, None)))
        return _quantized(x, chosen, weights, mlp, quantizer, n_sequences)
    # Autocast affects neither products with an `out` argument nor `embedding_bag`, so the cast is made here.
    dtype = product_dtype(x)
    x, up, down, gate = x.to(dtype), up.to(dtype), down.to(dtype), None if gate is None else gate.to(dtype)
    name = path_of("experts", x.device.type)
    if name == "triton" and biases is None:
        from explore.kernels.routed_experts import routed_experts

        return routed_experts(x, chosen, weights, up, gate, down, activation)
    path = _kernel() if name == "compiled" else {"loop": _loop, "dense": _dense}.get(name, _padded)
    offsets = (None if bias is None else bias.to(dtype) for bias in biases or (None, None, None))
    return path(x, chosen, weights, _Experts(activation, up, gate, down, *offsets))


@cache
def _kernel() -> Callable[[Tensor, Tensor, Tensor, _Experts], Tensor]:
    """The C++ kernel, with `_padded` where the compiler fails or the kernel cannot handle the experts."""
    from explore.kernels.grouped_experts import grouped_experts, handles

    def fast(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
        is_plain = mlp.activation == "relu2" and mlp.up_bias is None
        if is_plain and handles(x, mlp.up, mlp.down):
            return grouped_experts(x, chosen, weights, mlp.up, mlp.down)
        return _padded(x, chosen, weights, mlp)

    return or_uncompiled(fast, _padded)


class Visit(NamedTuple):
    """The computation of one expert.

    Attributes:
        tokens: indices of the tokens routed to it.
        weights: routing weight of its output for each of them.
        inner: input of its `down` matrix.
        output: its output before weighting.
    """

    tokens: Int[Tensor, " n"]
    weights: Float[Tensor, " n"]
    inner: Float[Tensor, "n f"]
    output: Float[Tensor, "n d"]


def visits(
    x: Float[Tensor, "t d"],
    chosen: Int[Tensor, "t k"],
    weights: Float[Tensor, "t k"],
    up: Float[Tensor, "e d f"],
    gate: Float[Tensor, "e d f"] | None,
    down: Float[Tensor, "e f d"],
    activation: Activation,
    biases: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Iterator[Visit]:
    """Yields the terms that `experts` sums, expert by expert."""
    mlp = _Experts(activation, up, gate, down, *(biases or (None, None, None)))
    for i in range(len(up)):
        tokens, place = (chosen == i).nonzero(as_tuple=True)
        one = _Experts(activation, *(None if each is None else each[i : i + 1] for each in mlp[1:]))  # type: ignore[arg-type]
        inner = _inner(one, x[tokens][None])
        yield Visit(tokens, weights[tokens, place], inner[0], _product(inner, one.down, one.down_bias)[0])


class _Experts(NamedTuple):
    """Weights of all or some experts; the first axis counts the experts."""

    activation: Activation
    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies the rows of each expert by its weight, from (e, rows, d) to (e, rows, f)."""
    y = rows @ weight
    return y if bias is None else y + bias.unsqueeze(-2)  # e 1 f


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _inner(mlp: _Experts, rows: Tensor, product: Product = _product) -> Tensor:
    gated = None if mlp.gate is None else product(rows, mlp.gate, mlp.gate_bias)
    return activate(product(rows, mlp.up, mlp.up_bias), gated, mlp.activation)


def _run(mlp: _Experts, rows: Tensor, product: Product = _product) -> Tensor:
    return product(_inner(mlp, rows, product), mlp.down, mlp.down_bias)


def _loop(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """Runs one expert after another over rows sorted by expert, without padding."""
    row_of, load = _sorted(chosen, len(mlp.up))  # t k, e
    loads = load.tolist()
    expert_of = torch.arange(len(load), device=x.device).repeat_interleave(load, output_size=chosen.numel())  # t*k

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Grouped.apply(rows, weight, loads)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias[expert_of]

    return _combined(_run(mlp, _dispatched(x, row_of, chosen.numel()), product), weights, row_of)


class _Grouped(torch.autograd.Function):
    """Multiplies rows, sorted by expert, by the weights of their expert."""

    @staticmethod
    def forward(
        ctx: Any, rows: Float[Tensor, "choices d"], weight: Float[Tensor, "e d f"], loads: list[int]
    ) -> Float[Tensor, "choices f"]:
        ctx.save_for_backward(rows, weight)
        ctx.loads = loads
        return grouped_product(rows, weight, loads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        return grouped_product(dy, weight.transpose(1, 2), ctx.loads), grouped_outer(rows, dy, ctx.loads), None


def _quantized(
    x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts, quantizer: Quantizer, n_sequences: int
) -> Tensor:
    """Runs one expert after another, as `_loop` does. The rows of an expert are sorted by sequence.

    The rows of each expert and sequence are padded with zeros to whole blocks.
    """
    n_experts = len(mlp.up)
    sequence_of = torch.arange(len(x), device=x.device) // (len(x) // n_sequences)  # t
    group_of = chosen * n_sequences + sequence_of[:, None]  # t k: expert and sequence of each choice
    sorted_row_of, load = _sorted(group_of, n_experts * n_sequences)  # t k, e*b
    filled = load + -load % quantizer.grain  # e*b
    # From contiguous rows to padded rows, as in `_padded`.
    row_of = sorted_row_of + ((filled.cumsum(0) - filled) - (load.cumsum(0) - load))[group_of]  # t k
    layout = Layout(filled.view(n_experts, n_sequences).tolist())
    n_rows = sum(layout.loads)
    holds_token = torch.zeros(n_rows, 1, dtype=torch.bool, device=x.device).index_fill_(0, row_of.flatten(), True)
    expert_of = layout.expert_of(x.device)  # rows

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        name = next(name for name in ("up", "gate", "down") if getattr(mlp, name) is weight)
        y = quantizer.product(rows, weight, layout, name)
        # A row without a token stays zero. Otherwise it would affect the scale of its block.
        return y if bias is None else torch.where(holds_token, y + bias.to(y.dtype)[expert_of], 0)

    rows = _dispatched(x.to(product_dtype(x)), row_of, n_rows)
    return _combined(_run(mlp, rows, product), weights, row_of)


def _padded(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """Runs experts in batched products. All experts of a batch are padded to one number of rows, their capacity.

    No token is dropped. If loads are even, all experts are one batch, padded to the largest load. Otherwise the experts
    are sorted by load and split into a few batches, each padded to its own largest load.

    Compared with `_loop`, the work grows by the ratio of capacity to load, but the products are far fewer and larger.
    `_loop` runs instead in two cases: if there would be too much padding, for example with few tokens and many experts;
    and in fp32 on a CPU, where a batch of large products is no faster than single products. In decoding the few rows
    are padded in both cases, unless most experts have no token and would be read in vain.
    """
    n_experts = len(mlp.up)
    # Decoding with a mean load from 1/2 to FEW. Below 1/2, most experts have no token.
    few = not torch.is_grad_enabled() and n_experts <= 2 * chosen.numel() <= 2 * FEW * n_experts
    if x.is_cpu and x.dtype == torch.float32 and not few:
        return _loop(x, chosen, weights, mlp)
    sorted_row_of, load = _sorted(chosen, n_experts)  # t k, e

    # Batches: the order of the experts, the number of experts in each batch, and its capacity, a multiple of the grain.
    grain = max(1, chosen.numel() // n_experts // CAPACITIES)
    even = few or int(load.max()) * n_experts <= EVEN * chosen.numel()
    by_load = torch.arange(n_experts, device=x.device) if even else load.argsort()  # smallest load first
    sizes = [n_experts] if even else _sizes(n_experts)
    capacities = [-(-int(part.max()) // grain) * grain for part in load[by_load].split(sizes)]
    n_rows = [size * capacity for size, capacity in zip(sizes, capacities, strict=True)]
    if sum(n_rows) > MAX_PADDING * chosen.numel() and not few:
        return _loop(x, chosen, weights, mlp)

    # From rows of the sorted list, which has no gaps, to padded rows: subtract the first row of the expert in that
    # list, which gives the place within the expert, and add the first padded row of the expert. `capacity` and its sums
    # are in the order of `by_load`; scatter_ puts the first rows back in the order of the experts.
    capacity = torch.tensor(capacities, device=x.device)  # batches
    capacity = capacity.repeat_interleave(torch.tensor(sizes, device=x.device), output_size=n_experts)  # e
    first_row = torch.empty_like(load).scatter_(0, by_load, capacity.cumsum(0) - capacity)  # e
    row_of = sorted_row_of + (first_row - (load.cumsum(0) - load))[chosen]  # t k

    batches = [mlp] if even else _batches(mlp, by_load, sizes)
    rows = _dispatched(x, row_of, sum(n_rows)).split(n_rows)  # one (size * capacity, d) for each batch
    outputs = [
        # Rows to (size, capacity, d) for the experts of the batch, and the result back to rows.
        _run(batch, part.unflatten(0, (len(batch.up), -1))).flatten(0, 1)
        for batch, part in zip(batches, rows, strict=True)
    ]
    return _combined(outputs[0] if even else torch.cat(outputs), weights, row_of)


def _sizes(n_experts: int) -> list[int]:
    """Number of experts in each batch: half of all, then half of the rest, and so on; the last has the remaining ones.

    Experts are sorted by load, smallest first. The busiest experts, whose loads differ most, are thus in small batches.
    """
    sizes: list[int] = []
    while len(sizes) < BATCHES - 1 and (half := (n_experts - sum(sizes)) // 2):
        sizes.append(half)
    return [*sizes, n_experts - sum(sizes)]


def _batches(mlp: _Experts, by_load: Tensor, sizes: list[int]) -> list[_Experts]:
    """The weights of each batch of experts."""
    # Splits each field by batch, and then collects the fields of each batch. An absent field is absent in every batch.
    parts: list[Any] = [
        [None] * len(sizes) if part is None else part.index_select(0, by_load).split(sizes) for part in mlp[1:]
    ]
    return [_Experts(mlp.activation, *each) for each in zip(*parts, strict=True)]


def _dense(x: Tensor, chosen: Tensor, weights: Tensor, mlp: _Experts) -> Tensor:
    """Runs every expert on every token; experts that were not chosen have weight zero.

    The result is exact and takes n_experts / top_k times the work. No shape depends on data, so the whole graph can be
    exported.
    """
    n_experts = len(mlp.up)
    weight = x.new_zeros(x.shape[0], n_experts).scatter_add(1, chosen, weights.to(x.dtype))  # t e
    inner = _inner(mlp, x[None].expand(n_experts, -1, -1))  # e t f
    # The inner values of all experts stand side by side, each times its weight. One product with the stacked down
    # matrices then also sums over the experts.
    weighted = (weight.T[..., None] * inner).transpose(0, 1).flatten(1)  # t e*f
    y = linear(weighted, mlp.down.flatten(0, 1).T)  # t d
    return y if mlp.down_bias is None else y + weight @ mlp.down_bias


def _sorted(chosen: Int[Tensor, "t k"], n_experts: int) -> tuple[Int[Tensor, "t k"], Int[Tensor, " e"]]:
    """The row of each choice in a list of choices sorted by expert, and the number of choices of each expert."""
    expert_of = chosen.flatten()  # t*k
    # A stable sort keeps the order of the tokens within an expert, so sums over them have a fixed order.
    order = expert_of.argsort(stable=True)  # t*k: the choice in each row
    # The inverse permutation: the row of each choice.
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return row_of.view_as(chosen), expert_of.bincount(minlength=n_experts)


def _dispatched(x: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    rows: Tensor = _Dispatch.apply(x, row_of, n_rows)  # type: ignore[no-untyped-call]
    return rows


def _combined(outputs: Tensor, weights: Tensor, row_of: Tensor) -> Tensor:
    y: Tensor = _Combine.apply(outputs, weights.to(outputs.dtype), row_of)  # type: ignore[no-untyped-call]
    return y


class _Dispatch(torch.autograd.Function):
    """Copies every token to its rows, one per choice; rows without a choice are zero.

    Torch's `embedding_bag` gathers and sums in one multi-threaded pass, here in both directions. Autograd's backward
    pass of an index would add row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "t d"], row_of: Int[Tensor, "t k"], n_rows: int) -> Float[Tensor, "rows d"]:
        ctx.save_for_backward(row_of)
        return _placed(x, torch.ones_like(row_of, dtype=x.dtype), row_of, n_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (row_of,) = ctx.saved_tensors
        # One bag per token: the sum of the gradients in its k rows, t d.
        return F.embedding_bag(row_of, drows, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """Sums the rows of each token, each times the weight of its choice."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Float[Tensor, "rows d"], weights: Float[Tensor, "t k"], row_of: Int[Tensor, "t k"]
    ) -> Float[Tensor, "t d"]:
        ctx.save_for_backward(outputs, weights, row_of)
        # One bag of k rows per token. The rows (t k d) are never stored.
        return F.embedding_bag(row_of, outputs, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights, row_of = ctx.saved_tensors
        dweights = (F.embedding(row_of, outputs) * dy[:, None]).sum(-1)  # from t k d
        return _placed(dy, weights, row_of, len(outputs)), dweights, None


def _placed(
    x: Float[Tensor, "t d"], weights: Float[Tensor, "t k"], row_of: Int[Tensor, "t k"], n_rows: int
) -> Float[Tensor, "rows d"]:
    """Returns rows that hold their token times its weight; rows without a token are zero.

    This is a gather by row, so it needs the inverse of `row_of`: the token of each row.
    """
    rows, token = row_of.flatten(), torch.arange(len(x), device=x.device)
    # A row of padding gets token 0 and weight 0.
    token_of = rows.new_zeros(n_rows).scatter_(0, rows, token.repeat_interleave(row_of.shape[1]))
    weight_of = weights.new_zeros(n_rows).scatter_(0, rows, weights.flatten())
    return F.embedding_bag(token_of[:, None], x, mode="sum", per_sample_weights=weight_of[:, None])
