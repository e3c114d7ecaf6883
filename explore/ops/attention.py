"""Causal grouped-query attention and rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.paths import OpPath, declare, path_of

declare(
    "attention",
    OpPath("blocked", default_on="cpu"),
    OpPath("sdpa", default_on="any"),
    OpPath("written_out", reference=True, countable=True),
    OpPath("sums", backward=False, decoding=True),
)


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
    if path == "sums" and seq == 1:
        return _sums(q, k, v, window, sinks)
    if path == "sums" or (torch.compiler.is_exporting() and path == "blocked"):  # an exported graph writes nowhere
        path = "sdpa"
    if path == "written_out" or (sinks is not None and path == "sdpa"):
        return _written_out(q, k, v, window, sinks)
    if path == "blocked":
        return _blocked(q, k, v, window, sinks)
    if window is not None and window < context:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, window, q), enable_gqa=True)
    if seq not in (1, context):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, context, None, q), enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=seq > 1, enable_gqa=True)


def _block_rows(q: Tensor) -> int:
    """Queries of a block: few, so that little beyond the diagonal is computed, enough for one product to be large.

    That is more of them in bf16, whose products take longer to begin and less to end.
    """
    return min(q.shape[1], 64 if q.shape[2] == 1 or q.dtype.itemsize == 2 else 32)


def _blocked(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """A block of queries after another against the keys that it can see, the heads of a group in one product.

    Neither pass keeps what is quadratic in the length: the backward pass makes each block's softmax again.
    """
    batch, heads, seq, _ = q.shape
    groups = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(v.dtype).unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 1)
        k, v = k.to(v.dtype).flatten(0, 1), v.flatten(0, 1)
        if torch.is_grad_enabled():
            y: Tensor = _Blocked.apply(q, k, v, window, sinks)  # type: ignore[no-untyped-call]
        else:
            y = _outputs(q, k, v, window, sinks)
        y = y.unflatten(0, (batch, groups)).transpose(2, 3)
        return y.reshape(batch, heads, seq, -1)


class _Blocked(torch.autograd.Function):
    """Of q (batch * groups, seq, heads of a group, d_head), k (batch * groups, context, d_head) and v like k."""

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
        dq, dy, exact = q.new_empty(q.shape), dy.contiguous(), torch.promote_types(v.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        room = _room(q, k, ctx.window, sinks)
        for rows, seen, queries, weights in _blocks(q, k, ctx.window, sinks):
            n, given = seen.stop - seen.start, dy[:, rows].flatten(1, 2)
            dv[:, seen] += weights[..., :n].mT @ given
            dscores = _part(room, weights.shape)
            torch.bmm(given, v[:, seen].mT, out=dscores[..., :n])
            if dsinks is not None:
                dscores[..., n] = 0  # a sink gives no value
            torch.ops.aten._softmax_backward_data(dscores, weights, -1, weights.dtype, grad_input=dscores)
            if dsinks is not None:
                of_heads = dscores[..., n].unflatten(1, (-1, q.shape[2])).sum(1)
                dsinks += of_heads.view(-1, len(dsinks)).sum(0)
            dq[:, rows].view(queries.shape).copy_(dscores[..., :n] @ k[:, seen])
            dk[:, seen] += dscores[..., :n].mT @ queries
        return dq.mul_(q.shape[-1] ** -0.5), dk.to(k.dtype), dv.to(v.dtype), None, dsinks


def _outputs(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    for rows, seen, _, weights in _blocks(q, k, window, sinks):
        found = y[:, rows].view(*weights.shape[:2], -1)  # a product that wrote there itself would go one by one
        found.copy_(weights[..., : seen.stop - seen.start] @ v[:, seen])
    return y


def _blocks(
    q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of a block, keys that they see, scaled queries of all heads of a group, and their softmax over the keys.

    Where there are sinks, they are its last column. The next block's softmax takes the place of the last one's.
    """
    seq, per_group, d = q.shape[1:]
    before, block = k.shape[1] - seq, _block_rows(q)
    hidden = None if seq == 1 else _hidden(block, window, k)  # one query sees all that is left of its context
    room, q = _room(q, k, window, sinks), q.contiguous() * d**-0.5
    for start in range(0, seq, block):
        rows = slice(start, min(start + block, seq))
        seen = slice(0 if window is None else max(0, before + start + 1 - window), before + rows.stop)
        n_rows, n = rows.stop - rows.start, seen.stop - seen.start
        queries = q[:, rows].flatten(1, 2)
        scores = _part(room, (len(q), n_rows * per_group, n + (sinks is not None)))
        torch.bmm(queries, k[:, seen].mT, out=scores[..., :n])
        of_heads = scores.unflatten(1, (n_rows, per_group))
        if hidden is not None:
            to_rows = hidden[:n_rows, : hidden.shape[1] - block + n_rows][:, -n:]
            of_heads[..., n - to_rows.shape[1] : n] += to_rows.unsqueeze(1)
        if sinks is not None:
            of_heads.unflatten(0, (-1, len(sinks) // per_group))[..., n] = sinks.view(-1, 1, per_group)
        yield rows, seen, queries, torch.softmax(scores, -1, out=scores)


def _hidden(block: int, window: int | None, k: Tensor) -> Tensor:
    """What is added to the scores of a block's rows, from the first key that a window may hide from one of them on."""
    width = 1 if window is None else min(window, k.shape[1])
    key, row = torch.arange(1 - width, block, device=k.device), torch.arange(block, device=k.device).unsqueeze(1)
    hidden = key > row
    if window is not None:
        hidden |= key <= row - window
    return k.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _room(q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Memory of the scores of any block, to be used again by the next, which is faster than to ask for it each time."""
    context = k.shape[1] if window is None else min(window + _block_rows(q) - 1, k.shape[1])
    return q.new_empty(len(q) * _block_rows(q) * q.shape[2] * (context + (sinks is not None)))


def _part(room: Tensor, shape: Sequence[int]) -> Tensor:
    return room[: math.prod(shape)].view(shape)


def _sums(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """One query of each head as sums over channels and over keys, which torch compiles to loops.

    With the heads of a group one by one, a loop reads what they share once and adds to as many sums as there are heads.
    """
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    q = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))  # b g r 1 d
    scores = torch.stack([(query * k).sum(-1) for query in q.unbind(2)], dim=2)  # b g r n
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.view(q.shape[1:3]).unsqueeze(-1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    y = torch.stack([(weight.unsqueeze(-1) * v).sum(-2) for weight in weights.unbind(2)], dim=2) / total
    return y.flatten(1, 2).unsqueeze(2).to(v.dtype)


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
