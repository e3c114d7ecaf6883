"""Times the kernel and torch's attention on this CPU, and prints their distance from float64.

python kernels/causal_attention/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.causal_attention import causal_attention
from explore.kernels.cpp import timing

SHAPES = ((8, 512, 6, 2, 32), (8, 1024, 8, 2, 64), (16, 128, 4, 2, 32), (1, 4096, 8, 2, 64))
"""Batch, positions, heads, key-value heads, channels per head."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return timing.run(__doc__, {"kernel": causal_attention, "torch": torch_attention}, shapes(), arguments)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def shapes() -> Iterator[tuple[str, timing.Inputs]]:
    """Names and inputs of all shapes."""
    return ((str(shape), partial(inputs, shape)) for shape in SHAPES)


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Random q, k and v in the layout of a model: positions before heads in memory."""
    batch, seq, n_heads, n_kv_heads, d_head = shape
    random = torch.Generator().manual_seed(0)
    sizes = (batch, seq, n_heads, d_head), (batch, seq, n_kv_heads, d_head), (batch, seq, n_kv_heads, d_head)
    return [torch.randn(size, generator=random).to(dtype).transpose(1, 2).requires_grad_() for size in sizes]


if __name__ == "__main__":
    raise SystemExit(main())
