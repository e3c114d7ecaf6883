"""Language-model loss straight from hidden states."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from explore.ops.paths import path_of

MAX_LOGITS = 1 << 21
"""Logits that are alive at once: 8 MiB in fp32."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of softmax(hidden weight^T), in nats; a target of -100 is left out.

    Logits are made, used and dropped a slice of tokens at a time, and made again in the backward pass,
    so the whole (tokens, vocab_size) matrix never exists.
    """
    if path_of("loss", hidden.device.type) == "triton":
        from explore.kernels import linear_cross_entropy as kernel

        return kernel.linear_cross_entropy(hidden, weight, targets)
    rows = max(1, MAX_LOGITS // weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_slice_loss, h, weight, y, use_reentrant=False, preserve_rng_state=False)
    return total


def _slice_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")
