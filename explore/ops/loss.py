"""Language-model loss straight from hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.paths import OpPath, declare, path_of, product_dtype

declare(
    "loss",
    OpPath("sliced", default_on="any"),
    OpPath("whole", reference=True, countable=True),
    OpPath("triton", default_on="cuda", needs="triton"),
)


MAX_LOGITS = 1 << 19
"""Logits that are alive at once, 2 MiB in fp32, which a cache holds."""

MIN_ROWS = 64
"""But rows of a slice at least, since each adds to the gradient of the whole head."""

IGNORED = -100


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of softmax(hidden weight^T), in nats; a target of -100 is left out.

    Logits are made, used and dropped a slice of tokens at a time, so the whole (tokens, vocab_size) matrix never
    exists. Where gradients are wanted, each slice gives its own at once, so that nothing is made a second time; they
    are kept until the backward pass, as large as `hidden` and as `weight` in fp32.
    """
    if path_of("loss", hidden.device.type) == "triton":
        from explore.kernels import linear_cross_entropy as kernel

        return kernel.linear_cross_entropy(hidden, weight, targets)
    if path_of("loss", hidden.device.type) == "whole":
        return _cross_entropy(hidden, weight, targets)
    if torch.is_grad_enabled():
        total: Tensor = _Sliced.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in _slices(hidden, weight):
        total = total + _cross_entropy(hidden[rows], weight, targets[rows])
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORED, reduction="sum")


def _slices(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(MIN_ROWS, MAX_LOGITS // weight.shape[0])
    return (slice(start, start + size) for start in range(0, len(hidden), size))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        dtype = product_dtype(hidden)
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        dhidden, exact = torch.empty_like(hidden), torch.promote_types(dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=exact)  # a row is in every slice, whose parts are added up
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(hidden, weight):
                ignored = (targets[rows] == IGNORED).unsqueeze(1)
                target = targets[rows].unsqueeze(1).masked_fill(ignored, 0)
                logits = (hidden[rows] @ weight.T).float()
                logits -= logits.amax(1, keepdim=True)
                picked = logits.gather(1, target)
                softmax = logits.exp_()
                norm = softmax.sum(1, keepdim=True)
                total += (norm.log() - picked).masked_fill(ignored, 0).sum()
                dlogits = softmax.div_(norm).scatter_add_(1, target, torch.full_like(norm, -1))
                dlogits = dlogits.masked_fill_(ignored, 0).to(dtype)
                torch.mm(dlogits, weight, out=dhidden[rows])
                if dtype == exact:
                    dweight.addmm_(dlogits.T, hidden[rows])
                else:
                    dweight += dlogits.T @ hidden[rows]
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, None]:
        dhidden, dweight = ctx.saved_tensors
        of_hidden, of_weight = ctx.dtypes
        return (dtotal * dhidden).to(of_hidden), (dtotal * dweight).to(of_weight), None
