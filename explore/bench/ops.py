"""Time of every op on each of its paths, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from explore.blocks import Mamba2Config
from explore.ops import (
    PATHS,
    attention,
    causal_conv1d,
    experts,
    forced_paths,
    gated_group_rms_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    ssd,
)

Op = Callable[[], Tensor]


def time_ops(d_model: int, n_tokens: int, seq_len: int, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Times every op on every path, in fp32 and bf16, at the shapes of a model of a width.

    Yields:
        Records of op, path, precision, and seconds of the fastest forward and backward pass. The step-by-step
        recurrence, what needs a package, a device or a compiler, and what has no backward pass are left out.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for op, work in _works(d_model, n_tokens, seq_len, dtype).items():
            name = op.partition(",")[0]
            for path in PATHS[name]:
                if path.needs or path.compiled or path.stepwise or not path.backward:
                    continue
                with forced_paths(**{name: path.name}):
                    seconds = min(timed(work, dtype == torch.bfloat16) for _ in range(repeats + 1))
                yield {"op": op, "path": path.name, "precision": str(dtype).removeprefix("torch."), "seconds": seconds}


def timed(work: Op, autocast: bool) -> float:
    """Seconds of a forward and backward pass."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = work()
    y.float().square().mean().backward()
    return time.perf_counter() - began


def _works(d_model: int, n_tokens: int, seq_len: int, dtype: torch.dtype) -> dict[str, Op]:
    generator = torch.Generator().manual_seed(0)
    batch, heads = n_tokens // seq_len, d_model // 32
    mamba = Mamba2Config(n_heads=2 * heads, d_head=32, d_state=64, n_groups=1, chunk_size=64)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.1).to(dtype).requires_grad_()

    targets = torch.randint(4 * d_model, (n_tokens,), generator=generator)
    tokens, weight = leaf(n_tokens, d_model), leaf(4 * d_model, d_model)
    scale = leaf(d_model)
    q, k, v = leaf(batch, heads, seq_len, 32), leaf(batch, 2, seq_len, 32), leaf(batch, 2, seq_len, 32)

    def routed(n: int, top_k: int, d: int, f: int) -> Op:
        tokens, up, down = leaf(n_tokens, d), leaf(n, d, f), leaf(n, f, d)
        weights, chosen = torch.rand(n_tokens, n, generator=generator).topk(top_k, dim=-1)
        return lambda: experts(tokens, chosen, weights, up, None, down, "relu2")

    return {
        "attention": lambda: attention(q, k, v),
        "linear": lambda: linear(tokens, weight),
        "loss": lambda: linear_cross_entropy(tokens, weight, targets),
        "norm, plain": lambda: rms_norm(tokens, scale, 1e-5),
        **mamba_works(mamba, batch, seq_len, dtype),
        "experts, 16 top 2": routed(16, 2, d_model, d_model),
        "experts, 64 top 8, latent": routed(64, 8, d_model // 4, d_model),
    }


def mamba_works(block: Mamba2Config, batch: int, seq_len: int, dtype: torch.dtype) -> dict[str, Op]:
    """The ops of a Mamba-2 layer between its projections, at its own shapes."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.1).to(of).requires_grad_()

    c, h, g, n = block.d_conv_channels, block.n_heads, block.n_groups, block.d_state
    x, filters, bias = leaf(batch, seq_len, c), leaf(c, 1, block.d_conv), leaf(c)
    y, z, scale = leaf(batch, seq_len, block.d_inner), leaf(batch, seq_len, block.d_inner), leaf(block.d_inner)
    X, B, C = leaf(batch, seq_len, h, block.d_head), leaf(batch, seq_len, g, n), leaf(batch, seq_len, g, n)
    dt = torch.rand(batch, seq_len, h, generator=generator).mul_(0.1).requires_grad_()
    A, D = -torch.rand(h, generator=generator).add_(1), leaf(h, of=torch.float32)
    return {
        "conv": lambda: causal_conv1d(x, filters, bias),
        "norm": lambda: gated_group_rms_norm(y, z, scale, g, block.norm_eps),
        "ssd": lambda: ssd(X, dt, A, B, C, D, block.chunk_size)[0],
    }
