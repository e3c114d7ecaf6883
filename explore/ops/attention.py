"""Causal grouped-query attention and rotary position embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from explore.ops.paths import path_of


def attention(
    q: Float[Tensor, "batch n_heads seq d_head"],
    k: Float[Tensor, "batch n_kv_heads seq d_head"],
    v: Float[Tensor, "batch n_kv_heads seq d_head"],
    window: int | None = None,
) -> Float[Tensor, "batch n_heads seq d_head"]:
    """Scaled dot-product attention in which a query sees itself and what came before.

    Args:
        window: positions that a query sees at most, itself included; all when absent.
    """
    seq = q.shape[2]
    if path_of("attention") == "written_out":
        return _written_out(q, k, v, window)
    if window is None or window >= seq:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(seq, window, q), enable_gqa=True)


def _written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~_visible(q.shape[2], window, q), -torch.inf)
    y: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return y


def _visible(seq: int, window: int | None, like: Tensor) -> Tensor:
    visible = torch.ones(seq, seq, dtype=torch.bool, device=like.device).tril()
    return visible if window is None else visible.triu(1 - window)


def rotate(x: Float[Tensor, "batch heads seq d_head"], theta: float) -> Float[Tensor, "batch heads seq d_head"]:
    """Rotary position embedding in the half-split layout of Llama and Qwen.

    Source: arXiv 2104.09864; pairs are (i, i + d_head / 2), not neighbours.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
