"""Cross-entropy of rows of logits on a CPU in C++. The gradient takes the place of the logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explore.kernels.cpp import computes, integers, is_bf16, library, views


def row_cross_entropy(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"], ignored: int
) -> Float[Tensor, " rows"]:
    """Returns the cross-entropy of each row in nats, and overwrites the logits with its gradient.

    Logits are fp32 or bf16, sums fp32. The targets are int64.

    Args:
        ignored: target of rows whose loss and gradient are zero.

    Raises:
        ValueError: a dtype or device that the kernel does not handle; `handles` tells before.
        RuntimeError: the compiler is missing or fails; an error of `torch._inductor.exc`.
    """
    if not handles(logits):
        raise ValueError(
            "logits must be dense, on a CPU, in fp32 or (with AVX-512) bf16, "
            f"got {logits.dtype} on {logits.device} with strides {logits.stride()}"
        )
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    targets = targets.contiguous()
    tensors = views(logits, targets, losses, strides=())
    library().cross_entropy_rows(is_bf16(logits), integers(*logits.shape, ignored), tensors)
    return losses


def handles(logits: Tensor) -> bool:
    """Whether the kernel computes this cross-entropy on this machine."""
    return computes(logits) and logits.is_contiguous()
