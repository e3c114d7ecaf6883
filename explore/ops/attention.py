"""Causal grouped-query attention and rotary position embedding.

Shapes: b batch, h n_heads, g n_kv_heads (groups), r heads per group (h = g r, the heads of a group are adjacent),
l queries, n keys, d d_head, e d_v; (bg) is b and g as one axis. The queries are the last l of n positions: query i is
at position n - l + i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.compilation import or_uncompiled
from explore.ops.paths import OpPath, declare, path_of

declare(
    "attention",
    OpPath("blocked", default_on="cpu"),
    OpPath("sdpa", default_on="any"),
    OpPath("written_out", reference=True, countable=True),
    OpPath("compiled", compiled=True),
    OpPath("sums", backward=False, decoding=True),
)


def attention(
    q: Float[Tensor, "batch n_heads seq d_head"],
    k: Float[Tensor, "batch n_kv_heads context d_head"],
    v: Float[Tensor, "batch n_kv_heads context d_v"],
    window: int | None = None,
    sinks: Float[Tensor, " n_heads"] | None = None,
) -> Float[Tensor, "batch n_heads seq d_v"]:
    """Causal scaled dot-product attention.

    The queries are the last positions of the context: all positions in training, one in decoding.

    Args:
        window: maximum number of positions that a query sees, including its own; None is unlimited.
        sinks: one logit per head that is part of the softmax but has no value.
    """
    seq, context = q.shape[2], k.shape[2]
    path = path_of("attention", q.device.type)
    if path == "sums" and seq == 1:
        return _sums(q, k, v, window, sinks)
    # "sums" is for one query. The others write their output block by block, which an exported graph cannot do.
    if path == "sums" or (torch.compiler.is_exporting() and path in ("blocked", "compiled")):
        path = "sdpa"
    # Torch's attention does not support sinks.
    if path == "written_out" or (sinks is not None and path == "sdpa"):
        return _written_out(q, k, v, window, sinks)
    if path == "compiled":
        return _kernel()(q, k, v, window, sinks)
    if path == "blocked":
        return _blocked(q, k, v, window, sinks)
    # Torch's causal mask aligns the first query with the first key, which is right only if there are as many queries as
    # keys. A single query sees every key, so it needs no mask.
    if window is not None and window < context:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, window, q), enable_gqa=True)
    if seq not in (1, context):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, None, q), enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=seq > 1, enable_gqa=True)


def _block_rows(q: Tensor) -> int:
    """Number of positions in a block of q, (bg) l r d.

    A small block wastes less work above the diagonal; a large block makes larger products. bf16 has larger blocks,
    because its products take longer to start and less time to run.
    """
    return min(q.shape[1], 64 if q.shape[2] == 1 or q.dtype.itemsize == 2 else 32)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Computes one block of queries at a time with the keys that it sees; one product covers the heads of a group.

    Neither pass stores a tensor that is quadratic in the length: the backward pass recomputes the softmax of each
    block.
    """
    batch, heads, seq, _ = q.shape
    groups = k.shape[1]
    # Under autocast, norms and rotation may leave q and k in a wider dtype than v. Products use the dtype of v.
    with torch.autocast(q.device.type, enabled=False):
        # b h l d -> b g r l d -> b g l r d -> (bg) l r d. The heads of a group read the same keys, so their rows are
        # stacked: a block of positions is one matrix.
        q = q.to(v.dtype).unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1)
        # b g n d -> (bg) n d
        k, v = k.to(v.dtype).flatten(0, 1), v.flatten(0, 1)
        if torch.is_grad_enabled():
            y: Tensor = _Blocked.apply(q, k, v, window, sinks)  # type: ignore[no-untyped-call]
        else:
            y = _outputs(q, k, v, window, sinks)
        # (bg) l r e -> b g l r e -> b g r l e -> b h l e
        y = y.unflatten(0, (batch, groups)).transpose(2, 3)
        return y.reshape(batch, heads, seq, -1)


@cache
def _kernel() -> Callable[..., Tensor]:
    """The C++ kernel, with `_blocked` in its place where the compiler fails or the kernel cannot handle the tensors."""
    from explore.kernels.causal_attention import causal_attention, handles

    def fast(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        # Under autocast, norms and rotation may leave q and k in a wider dtype than v.
        q, k = q.to(v.dtype), k.to(v.dtype)
        attend = causal_attention if handles(q, k, v) else _blocked
        return attend(q, k, v, window, sinks)

    return or_uncompiled(fast, _blocked)


class _Blocked(torch.autograd.Function):
    """Attention of q ((bg) l r d), k ((bg) n d) and v ((bg) n e), with its gradients.

    With P = softmax(S), S = Q K^T / sqrt(d) and Y = P V: dV = P^T dY, dP = dY V^T, dS = P . (dP - rowsum(P . dP)),
    dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.window = window
        return _outputs(q, k, v, window, sinks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        # Several blocks see a key. Their contributions to dk and dv are summed in at least fp32.
        dq, dy, exact = q.new_empty(q.shape), dy.contiguous(), torch.promote_types(v.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        buffer = _score_buffer(q, k, ctx.window, sinks)
        for rows, keys, queries, weights in _blocks(q, k, ctx.window, sinks):
            # (bg) rows r e -> (bg) (rows r) e, in the order of the rows of `weights`, P: (bg) (rows r) n
            n, dy_rows = keys.stop - keys.start, dy[:, rows].flatten(1, 2)
            dv[:, keys] += weights[..., :n].mT @ dy_rows
            # dP, which becomes dS in the same memory
            dscores = _part(buffer, weights.shape)
            torch.bmm(dy_rows, v[:, keys].mT, out=dscores[..., :n])
            if dsinks is not None:
                # A sink has no value: its weight changes the output only through the sum of the softmax.
                dscores[..., n] = 0
            torch.ops.aten._softmax_backward_data(dscores, weights, -1, weights.dtype, grad_input=dscores)
            if dsinks is not None:
                # (bg) (rows r) -> (bg) rows r -> (bg) r: the logit of a sink is the same at all positions
                per_head = dscores[..., n].unflatten(1, (-1, q.shape[2])).sum(1)
                # (bg) r -> b h -> h
                dsinks += per_head.view(-1, len(dsinks)).sum(0)
            dq[:, rows].view(queries.shape).copy_(dscores[..., :n] @ k[:, keys])
            # `queries` already include the factor 1 / sqrt(d) of dK; dQ is multiplied by it at the end.
            dk[:, keys] += dscores[..., :n].mT @ queries
        return dq.mul_(q.shape[-1] ** -0.5), dk.to(k.dtype), dv.to(v.dtype), None, dsinks


def _outputs(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Weighted sums of the values, (bg) l r e, without the column of the sinks."""
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    for rows, keys, _, weights in _blocks(q, k, window, sinks):
        # View of (bg) rows r e as (bg) (rows r) e. The product is computed first and then copied: with `out` in rows of
        # a larger tensor, torch would compute it matrix by matrix instead of as one batch.
        y_rows = y[:, rows].view(*weights.shape[:2], -1)
        y_rows.copy_(weights[..., : keys.stop - keys.start] @ v[:, keys])
    return y


def _blocks(
    q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yields, for each block, its rows of q, the keys that they see, the scaled queries, and the softmax over the keys.

    Queries are (bg) (rows r) d. The softmax is (bg) (rows r) n, with one more column if there are sinks. The next block
    overwrites the softmax.
    """
    seq, per_group, d = q.shape[1:]
    before, block = k.shape[1] - seq, _block_rows(q)
    # A single query sees all keys in `keys`, so it needs no mask.
    mask_bias = None if seq == 1 else _mask_bias(block, window, k)
    buffer, q = _score_buffer(q, k, window, sinks), q.contiguous() * d**-0.5
    for start in range(0, seq, block):
        rows = slice(start, min(start + block, seq))
        # From the first key in the window of the first row to the last row's own key.
        keys = slice(0 if window is None else max(0, before + start + 1 - window), before + rows.stop)
        n_rows, n = rows.stop - rows.start, keys.stop - keys.start
        # (bg) rows r d -> (bg) (rows r) d
        queries = q[:, rows].flatten(1, 2)
        # (bg) (rows r) n, and a column for the sinks
        scores = _part(buffer, (len(q), n_rows * per_group, n + (sinks is not None)))
        torch.bmm(queries, k[:, keys].mT, out=scores[..., :n])
        # The same memory as (bg) rows r n, because the mask depends on the position and a sink on the head.
        by_head = scores.unflatten(1, (n_rows, per_group))
        if mask_bias is not None:
            # A shorter last block omits the last rows of the bias, and the keys of these rows, which are the last
            # columns. At the start of the sequence a block has fewer keys before it than a window holds.
            bias = mask_bias[:n_rows, : mask_bias.shape[1] - block + n_rows][:, -n:]
            # rows n -> rows 1 n, for the last columns only: all rows see every earlier key
            by_head[..., n - bias.shape[1] : n] += bias.unsqueeze(1)
        if sinks is not None:
            # (bg) rows r -> b g rows r; sinks h -> g 1 r
            by_head.unflatten(0, (-1, len(sinks) // per_group))[..., n] = sinks.view(-1, 1, per_group)
        yield rows, keys, queries, torch.softmax(scores, -1, out=scores)


def _mask_bias(block: int, window: int | None, k: Tensor) -> Tensor:
    """Bias of a block, (block, width - 1 + block): minus infinity where a row does not see a key, else zero.

    The first key is the first in the window of the block's first row, or that row's own key if there is no window. The
    last key is that of the block's last row.
    """
    width = 1 if window is None else min(window, k.shape[1])
    key, row = torch.arange(1 - width, block, device=k.device), torch.arange(block, device=k.device).unsqueeze(1)
    masked = key > row
    if window is not None:
        masked |= key <= row - window
    return k.new_zeros(masked.shape).masked_fill_(masked, -torch.inf)


def _score_buffer(q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Memory for the scores of the largest block. Reusing it is faster than allocating memory for each block."""
    context = k.shape[1] if window is None else min(window + _block_rows(q) - 1, k.shape[1])
    return q.new_empty(len(q) * _block_rows(q) * q.shape[2] * (context + (sinks is not None)))


def _part(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The start of the buffer as a contiguous tensor."""
    return buffer[: math.prod(shape)].view(shape)


def _sums(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Computes one query per head as sums over channels and over keys, which torch compiles to loops.

    The heads of a group are separate terms of one loop, which reads their keys only once.
    """
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    # b h 1 d -> b g r 1 d
    q = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
    # For each head of a group: b g 1 d times b g n d, summed over d, gives b g n. Stacked: b g r n.
    scores = torch.stack([(query * k).sum(-1) for query in q.unbind(2)], dim=2)
    # The softmax covers all heads at once, because torch runs a loop as short as one head's on one thread. The largest
    # score is subtracted so that the exponential does not overflow.
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        # h -> g r -> g r 1
        sinks = sinks.view(q.shape[1:3]).unsqueeze(-1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    # For each head of a group: b g n 1 times b g n e, summed over n, gives b g e. Stacked: b g r e. The division by the
    # sum comes last, because it then has e numbers per head instead of n.
    y = torch.stack([(weight.unsqueeze(-1) * v).sum(-2) for weight in weights.unbind(2)], dim=2) / total
    # b g r e -> b h e -> b h 1 e
    return y.flatten(1, 2).unsqueeze(2).to(v.dtype)


def _written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """The definition: the reference for the other paths."""
    repeats = q.shape[1] // k.shape[1]
    # b g n d -> b h n d: each head has its own copy of its group's keys and values
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    # b h l n
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~_visible(q.shape[2], k.shape[2], window, q), -torch.inf)
    if sinks is not None:
        # h -> b h l 1, one more column of scores
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    # The weight of the sink is not part of the sum over values.
    weights = scores.softmax(dim=-1).to(v.dtype)
    y: Tensor = weights[..., : k.shape[2]] @ v
    return y


def _visible(seq: int, context: int, window: int | None, like: Tensor) -> Tensor:
    """Mask (l, n), true where query i sees a key. The last key that query i sees is its own, at position n - l + i."""
    visible = torch.ones(seq, context, dtype=torch.bool, device=like.device).tril(context - seq)
    return visible if window is None else visible.triu(context - seq + 1 - window)


def rotate(
    x: Float[Tensor, "batch heads seq d_head"], theta: float, start: int = 0
) -> Float[Tensor, "batch heads seq d_head"]:
    """Rotary position embedding in the half-split layout of Llama and Qwen.

    Args:
        start: position of the first vector.

    Source: arXiv 2104.09864; pairs are (i, i + d_head / 2), not neighbours.
    """
    half = x.shape[-1] // 2
    # (d/2), (l) and (l, d/2), always in fp32: bf16 cannot represent neighbouring positions far from the start.
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    # Components i and i + d/2 are a point in a plane, rotated by the angle of its position.
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
