"""Times the kernel and a loop over experts in plain PyTorch on this CPU, and prints their distance from float64.

python kernels/grouped_experts/bench.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from explore.kernels.cpp import timing
from explore.kernels.grouped_experts import grouped_experts

SHAPES = ((4096, 8, 64, 48, 192), (4096, 2, 16, 192, 192), (4608, 8, 64, 48, 96))
"""Tokens, choices of a token, experts, width, inner width."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return timing.run(__doc__, {"kernel": kernel, "torch": torch_loop}, shapes(), arguments)


def kernel(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The kernel, for the experts with the best scores."""
    weights, chosen = scores.topk(_top_k(scores), dim=-1)
    return grouped_experts(x, chosen, weights, up, down)


def torch_loop(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same in plain PyTorch, one expert after another."""
    weights, chosen = scores.topk(_top_k(scores), dim=-1)
    y = torch.zeros_like(x)
    for i in range(len(up)):
        tokens, place = (chosen == i).nonzero(as_tuple=True)
        outputs = (x[tokens] @ up[i]).relu().square() @ down[i]
        y = y.index_add(0, tokens, outputs * weights[tokens, place][:, None].to(x.dtype))
    return y


def _top_k(scores: Tensor) -> int:
    """The bench marks the number of choices by that many positive scores of a token."""
    return int((scores[0] > 0).sum())


def shapes() -> Iterator[tuple[str, timing.Inputs]]:
    """Names and inputs of all shapes."""
    return ((str(shape), partial(inputs, shape)) for shape in SHAPES)


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Random x and experts in the dtype; scores in fp32, or float64 if that is the dtype."""
    n_tokens, top_k, n_experts, width, inner = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, width, generator=random)
    up, down = (torch.randn(n_experts, *size, generator=random) / 8 for size in ((width, inner), (inner, width)))
    drawn = torch.rand(n_tokens, n_experts, generator=random)
    scores = torch.zeros_like(drawn).scatter(1, drawn.topk(top_k).indices, drawn.topk(top_k).values + 0.1)
    wide = torch.promote_types(dtype, torch.float32)
    return [
        x.to(dtype).requires_grad_(),
        scores.to(wide).requires_grad_(),
        *(m.to(dtype).requires_grad_() for m in (up, down)),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
