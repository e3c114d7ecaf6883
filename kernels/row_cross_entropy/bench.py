"""Times the kernel and torch's cross-entropy on this CPU, and prints their distance from float64.

python kernels/row_cross_entropy/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from explore.kernels.cpp import timing
from explore.kernels.row_cross_entropy import row_cross_entropy

SHAPES = ((512, 1024), (512, 50_257))
"""Rows, tokens of the vocabulary."""
IGNORED = -100


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return timing.run(__doc__, {"kernel": kernel, "torch": torch_loss}, shapes(), arguments)


class _Loss(torch.autograd.Function):
    """The kernel as a function of logits; the gradient is computed in the forward pass, as in training."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = logits.clone()
        losses = row_cross_entropy(gradient, targets, IGNORED)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses[:, None].to(gradient.dtype), None


def kernel(logits: Tensor) -> Tensor:
    """The losses of the kernel."""
    losses: Tensor = _Loss.apply(logits, _targets(logits))  # type: ignore[no-untyped-call]
    return losses


def torch_loss(logits: Tensor) -> Tensor:
    """The same by torch."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, _targets(logits), reduction="none")


def _targets(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) * 7 % logits.shape[1]


def shapes() -> Iterator[tuple[str, timing.Inputs]]:
    """Names and inputs of all shapes."""
    return ((str(shape), partial(inputs, shape)) for shape in SHAPES)


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Random logits."""
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()]


if __name__ == "__main__":
    raise SystemExit(main())
