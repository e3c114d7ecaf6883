"""Times the kernel and the chunked form in plain PyTorch on this CPU, and prints their distance from float64.

python kernels/ssd_chunks/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.cpp import timing
from explore.kernels.ssd_chunks import ssd_chunks

SHAPES = ((8, 512, 1, 12, 32, 64, 64), (4, 1024, 2, 16, 64, 128, 128))
"""Batch, positions, groups, heads, d_head, d_state, chunk_size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    for shape in SHAPES:
        q = shape[-1]
        ways = {"kernel": partial(kernel, q=q), "torch": partial(torch_chunks, q=q)}
        timing.run(__doc__, ways, iter([(str(shape), partial(inputs, shape))]), arguments)
    return 0


def kernel(X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, q: int) -> Tensor:
    """The outputs of the kernel."""
    return ssd_chunks(X, dt, A, B, C, D, q)[0]


def torch_chunks(X: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, q: int) -> Tensor:
    """The same in plain PyTorch, for a length that is a multiple of q."""
    (b, seq, h, p), (g, n) = X.shape, B.shape[2:]
    Xc, dtc = X.view(b, -1, q, h, p), dt.view(b, -1, q, h)
    Bc, Cc = (M.view(b, -1, q, g, n).repeat_interleave(h // g, 3).to(X.dtype) for M in (B, C))
    cum = (dtc * A).cumsum(2)  # b c q h
    gaps = cum[:, :, :, None] - cum[:, :, None]  # b c i j h
    seen = torch.ones(q, q, dtype=torch.bool).tril()[:, :, None]
    weights = torch.einsum("bcihn,bcjhn->bcijh", Cc, Bc) * torch.where(seen, gaps, -torch.inf).exp().to(X.dtype)
    dtX = (dtc[..., None] * Xc).to(X.dtype)
    Y = torch.einsum("bcijh,bcjhp->bcihp", weights, dtX)
    added = torch.einsum("bcjhn,bcjhp->bchnp", Bc, dtX * (cum[:, :, -1:] - cum).exp()[..., None].to(X.dtype))
    state, states = torch.zeros_like(added[:, 0]), []
    for i in range(seq // q):
        states.append(state)
        state = state * cum[:, i, -1].exp()[..., None, None].to(X.dtype) + added[:, i]
    carried = torch.einsum("bcihn,bchnp->bcihp", Cc, torch.stack(states, 1)) * cum.exp()[..., None].to(X.dtype)
    return (Y + carried).reshape(X.shape) + (D[:, None] * X).to(X.dtype)


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Random X, B and C in the dtype; dt, A and D in fp32, or float64 if that is the dtype."""
    b, seq, g, h, p, n, _ = shape
    random = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    X, B, C = (
        torch.randn(size, generator=random).to(dtype) for size in ((b, seq, h, p), (b, seq, g, n), (b, seq, g, n))
    )
    dt = F.softplus(torch.randn(b, seq, h, generator=random) - 3).to(wide)
    A, D = (-torch.rand(h, generator=random).to(wide) - 1, torch.randn(h, generator=random).to(wide))
    return [x.requires_grad_() for x in (X, dt, A, B, C, D)]


if __name__ == "__main__":
    raise SystemExit(main())
