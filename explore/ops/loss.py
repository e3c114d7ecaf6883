"""Language-model loss computed from hidden states, without storing all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.compilation import or_uncompiled
from explore.ops.paths import OpPath, declare, path_of, product_dtype

declare(
    "loss",
    OpPath("sliced", default_on="any"),
    OpPath("whole", reference=True, countable=True),
    OpPath("triton", default_on="cuda", needs="triton"),
    OpPath("compiled", compiled=True),
)


MAX_LOGITS = 1 << 19
"""Maximum number of logits held at once: 2 MiB in fp32, which fits in cache."""

MIN_ROWS = 64
"""Minimum rows per slice, since each slice adds to the gradient of the whole head."""

IGNORED = -100


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of softmax(hidden weight^T), in nats; targets of -100 are ignored.

    Logits are computed and dropped one slice of tokens at a time, so the whole (tokens, vocab_size) matrix never
    exists. If gradients are needed, each slice computes them immediately, so nothing is recomputed. The gradients are
    kept until the backward pass; they are as large as `hidden`, and as `weight` in fp32. If there is more than one
    slice, tokens with target -100 get no logits.
    """
    if path_of("loss", hidden.device.type) == "triton":
        from explore.kernels import linear_cross_entropy as kernel

        return kernel.linear_cross_entropy(hidden, weight, targets)
    if path_of("loss", hidden.device.type) == "whole":
        return _cross_entropy(hidden, weight, targets)
    if len(hidden) > slice_size(weight) and not (predicted := targets != IGNORED).all():
        hidden, targets = hidden[predicted], targets[predicted]
    if torch.is_grad_enabled():
        total: Tensor = _Sliced.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in token_slices(hidden, weight):
        total = total + _cross_entropy(hidden[rows], weight, targets[rows])
    return total


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORED, reduction="sum")


def slice_size(weight: Tensor) -> int:
    """Number of tokens whose logits exist at the same time."""
    return max(MIN_ROWS, MAX_LOGITS // weight.shape[0])


def token_slices(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of tokens whose logits exist at the same time."""
    size = slice_size(weight)
    return (slice(start, start + size) for start in range(0, len(hidden), size))


class HeadGradients:
    """Gradients of a head and of its input, summed slice by slice from the gradients of the logits.

    Attributes:
        hidden, weight: input and weight of the head, in the dtype of the products.
        dhidden: gradient of `hidden`.
        dweight: gradient of `weight`, in fp32 at least: each of its rows is a sum over all slices.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        dtype = product_dtype(hidden)
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.dhidden = torch.empty_like(self.hidden)
        self.dweight = torch.zeros_like(self.weight, dtype=torch.promote_types(dtype, torch.float32))

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Adds the gradients of one slice of tokens. Call it without autocast."""
        dlogits = dlogits.to(self.hidden.dtype)
        torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.dweight.dtype == self.hidden.dtype:
            self.dweight.addmm_(dlogits.T, self.hidden[rows])
        else:
            self.dweight += dlogits.T @ self.hidden[rows]


def _differentiated(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row of logits, and the gradient of their sum."""
    ignored = (targets == IGNORED).unsqueeze(1)
    target = targets.unsqueeze(1).masked_fill(ignored, 0)
    logits = logits.float()
    logits -= logits.amax(1, keepdim=True)
    picked = logits.gather(1, target)
    softmax = logits.exp_()
    norm = softmax.sum(1, keepdim=True)
    dlogits = softmax.div_(norm).scatter_add_(1, target, torch.full_like(norm, -1))
    return (norm.log() - picked).masked_fill(ignored, 0), dlogits.masked_fill_(ignored, 0)


@cache
def _kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The C++ kernel, with `_differentiated` where the compiler fails or the kernel cannot handle the logits."""
    from explore.kernels.row_cross_entropy import handles, row_cross_entropy

    def fast(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not handles(logits):
            return _differentiated(logits, targets)
        return row_cross_entropy(logits, targets, IGNORED), logits  # the gradient is where the logits were

    return or_uncompiled(fast, _differentiated)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        gradients = HeadGradients(hidden, weight)
        hidden, weight = gradients.hidden, gradients.weight
        total = hidden.new_zeros((), dtype=torch.float32)
        differentiate = _kernel() if path_of("loss", hidden.device.type) == "compiled" else _differentiated
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in token_slices(hidden, weight):
                losses, dlogits = differentiate(hidden[rows] @ weight.T, targets[rows])
                total += losses.sum()
                gradients.add(rows, dlogits)
        ctx.save_for_backward(gradients.dhidden, gradients.dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, None]:
        dhidden, dweight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (dtotal * dhidden).to(hidden_dtype), (dtotal * dweight).to(weight_dtype), None
