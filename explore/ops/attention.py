"""Causal grouped-query attention and rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.paths import path_of


def attention(
    q: Float[Tensor, "batch n_heads seq d_head"],
    k: Float[Tensor, "batch n_kv_heads context d_head"],
    v: Float[Tensor, "batch n_kv_heads context d_v"],
    window: int | None = None,
    sinks: Float[Tensor, " n_heads"] | None = None,
) -> Float[Tensor, "batch n_heads seq d_v"]:
    """Scaled dot-product attention in which a query sees itself and what came before.

    The queries are the last positions of the context: all of it in training, one in decoding.

    Args:
        window: positions that a query sees at most, itself included; all when absent.
        sinks: a logit of each head that takes its part of the softmax and gives no value.
    """
    seq, context = q.shape[2], k.shape[2]
    path = path_of("attention", q.device.type)
    if path == "written_out" or (sinks is not None and path == "sdpa"):
        return _written_out(q, k, v, window, sinks)
    if path == "blocked":
        return _blocked(q, k, v, window, sinks)
    if window is not None and window < context:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, window, q), enable_gqa=True)
    if seq not in (1, context):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, None, q), enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=seq > 1, enable_gqa=True)


BLOCK = 64
"""Queries of a block: few, so that little beyond the diagonal is computed, and enough for one product to be large."""


def _blocked(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """A block of queries after another against the keys that it can see, the heads of a group in one product.

    Neither pass keeps what is quadratic in the length: the backward pass makes each block's softmax again.
    """
    batch, heads, seq, d = q.shape
    groups = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(v.dtype).view(batch, groups, heads // groups, seq, d), k.to(v.dtype)
        if torch.is_grad_enabled():
            y: Tensor = _Blocked.apply(q, k, v, window, sinks)  # type: ignore[no-untyped-call]
        else:
            y = _outputs(q, k, v, window, sinks)
        return y.view(batch, heads, seq, -1)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.window = window
        return _outputs(q, k, v, window, sinks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        # A key is seen by several blocks, whose parts are added up in fp32 at least.
        dq, exact = torch.empty_like(q), torch.promote_types(v.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for rows, seen, queries, weights in _blocks(q, k, ctx.window, sinks):
            n, given = seen.stop - seen.start, dy[:, :, :, rows].flatten(2, 3)
            dv[:, :, seen] += weights[..., :n].transpose(-1, -2) @ given
            dweights = given @ v[:, :, seen].transpose(-1, -2)
            if dsinks is not None:  # a sink gives no value
                dweights = F.pad(dweights, (0, 1))
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if dsinks is not None:
                dsinks += dscores[..., n].unflatten(2, (q.shape[2], -1)).sum((0, 3)).view_as(dsinks)
            dq[:, :, :, rows] = (dscores[..., :n] @ k[:, :, seen]).unflatten(2, (q.shape[2], -1)) * q.shape[-1] ** -0.5
            dk[:, :, seen] += dscores[..., :n].transpose(-1, -2) @ queries
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, dsinks


def _outputs(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    for rows, seen, _, weights in _blocks(q, k, window, sinks):
        found = weights[..., : seen.stop - seen.start] @ v[:, :, seen]
        y[:, :, :, rows] = found.unflatten(2, (q.shape[2], -1))
    return y


def _blocks(
    q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of a block, keys that they see, scaled queries of all heads of a group, and their softmax over the keys.

    Where there are sinks, they are its last column.
    """
    batch, groups, per_group, seq, d = q.shape
    context = k.shape[2]
    before = context - seq
    hidden = None if seq == 1 else q.new_full((seq, context), -torch.inf).triu(before + 1)
    if hidden is not None and window is not None:
        hidden = hidden.masked_fill(~_visible(seq, context, window, q), -torch.inf)
    for start in range(0, seq, BLOCK):
        rows = slice(start, min(start + BLOCK, seq))
        seen = slice(0 if window is None else max(0, before + start + 1 - window), before + rows.stop)
        queries = q[:, :, :, rows].flatten(2, 3) * d**-0.5
        scores = queries @ k[:, :, seen].transpose(-1, -2)
        if hidden is not None:  # one query sees all that is left of its context
            scores.unflatten(2, (per_group, -1)).add_(hidden[rows, seen])
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(groups, per_group, 1).expand(-1, -1, rows.stop - start)
            scores = torch.cat((scores, sink.reshape(groups, -1, 1).expand(batch, -1, -1, -1)), dim=-1)
        yield rows, seen, queries, scores.softmax(dim=-1)


def _written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~_visible(q.shape[2], k.shape[2], window, q), -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(dim=-1).to(v.dtype)
    y: Tensor = weights[..., : k.shape[2]] @ v
    return y


def _visible(seq: int, context: int, window: int | None, like: Tensor) -> Tensor:
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
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
