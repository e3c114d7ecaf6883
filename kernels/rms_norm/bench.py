"""Times the kernel and torch's RMSNorm on this CPU, plain and after a gate, and prints their distance from float64.

python kernels/rms_norm/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.cpp import timing
from explore.kernels.rms_norm import rms_norm

SHAPES = ((4096, 192, "plain"), (4096, 384, "gated"), (8192, 1024, "gated"))
"""Rows, channels, and whether there is a gate."""
EPS = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return timing.run(__doc__, {"kernel": kernel, "torch": torch_norm}, shapes(), arguments)


def kernel(x: Tensor, weight: Tensor, z: Tensor | None = None) -> Tensor:
    """The kernel, with the arguments of the bench."""
    return rms_norm(x, weight, EPS, z)


def torch_norm(x: Tensor, weight: Tensor, z: Tensor | None = None) -> Tensor:
    """The same by torch."""
    wide = x.to(weight.dtype) if z is None else x.to(weight.dtype) * F.silu(z.to(weight.dtype))
    return F.rms_norm(wide, weight.shape, weight, EPS).to(x.dtype)


def shapes() -> Iterator[tuple[str, timing.Inputs]]:
    """Names and inputs of all shapes."""
    return ((str(shape), partial(inputs, shape)) for shape in SHAPES)


def inputs(shape: tuple[int, int, str], dtype: torch.dtype) -> list[Tensor]:
    """Random x in the dtype, the weight in fp32, or float64 if that is the dtype, and the gate if there is one."""
    rows, channels, kind = shape
    random = torch.Generator().manual_seed(0)
    x, z = (torch.randn(rows, channels, generator=random).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(channels, generator=random).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return [x, weight, *([z] if kind == "gated" else [])]


if __name__ == "__main__":
    raise SystemExit(main())
