"""Times the kernel and torch's convolution on this CPU, and prints their distance from float64.

python kernels/causal_conv/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.causal_conv import causal_conv
from explore.kernels.cpp import timing

SHAPES = ((8, 512, 512, 4), (8, 1024, 1536, 4), (16, 128, 128, 4))
"""Batch, positions, channels, taps."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return timing.run(__doc__, {"kernel": kernel, "torch": torch_conv}, shapes(), arguments)


def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The kernel, with the arguments of the bench."""
    return causal_conv(x, weight, bias, silu=True)


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by torch."""
    padded = F.pad(x, (0, 0, weight.shape[2] - 1, 0)).transpose(1, 2)
    return F.silu(F.conv1d(padded, weight.to(x.dtype), bias.to(x.dtype), groups=len(weight)).transpose(1, 2))


def shapes() -> Iterator[tuple[str, timing.Inputs]]:
    """Names and inputs of all shapes."""
    return ((str(shape), partial(inputs, shape)) for shape in SHAPES)


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Random x in the dtype, and filters and bias in fp32, or float64 if that is the dtype."""
    batch, seq, channels, n_taps = shape
    random = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sizes = {(batch, seq, channels): dtype, (channels, 1, n_taps): wide, (channels,): wide}
    return [torch.randn(size, generator=random).to(kind).requires_grad_() for size, kind in sizes.items()]


if __name__ == "__main__":
    raise SystemExit(main())
