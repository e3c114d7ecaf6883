"""FLOPs, bytes and minimum time of a loss as formulas of its shape; the README derives them.

Each operand of a launch counts as read once and each result as written once. A few bytes per token are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

H100_FLOPS_PER_S = 989e12
"""Dense bf16, published."""
H100_BYTES_PER_S = 3.35e12
"""HBM3 of the SXM card, published."""


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes moved and extra memory of one implementation of the loss.

    Attributes:
        extra_bytes_fwd: peak memory of the forward pass without inputs and loss; likewise for the backward pass,
            without inputs and gradients.
    """

    flops_fwd: float
    bytes_fwd: float
    flops_bwd: float
    bytes_bwd: float
    extra_bytes_fwd: float
    extra_bytes_bwd: float

    @property
    def bound_fwd_s(self) -> float:
        """Lower bound on the time of the forward pass on an H100."""
        return max(self.flops_fwd / H100_FLOPS_PER_S, self.bytes_fwd / H100_BYTES_PER_S)

    @property
    def bound_s(self) -> float:
        """Lower bound on the time of forward and backward pass on an H100."""
        return self.bound_fwd_s + max(self.flops_bwd / H100_FLOPS_PER_S, self.bytes_bwd / H100_BYTES_PER_S)


def tiled(
    tokens: int,
    vocab_size: int,
    d_model: int,
    itemsize: int,
    columns: int = 256,
    chunk_tokens: int = 8192,
    chunk_vocab: int = 8192,
) -> Work:
    """Work of this kernel.

    Args:
        itemsize: bytes of an element of the inputs.
        columns: columns of a tile, see `passes.Tiles`.
        chunk_tokens: see `passes.CHUNK_TOKENS`; likewise `chunk_vocab`.
    """
    n_tiles = math.ceil(vocab_size / columns)
    n_token_chunks, n_vocab_chunks = math.ceil(tokens / chunk_tokens), math.ceil(vocab_size / chunk_vocab)
    hidden_numel, weight_numel = tokens * d_model, vocab_size * d_model
    padded = math.ceil(min(vocab_size, chunk_vocab) / 16) * 16
    sum_numel = 0
    if itemsize < 4:  # fp32 gradients are summed in their final memory
        sum_numel += hidden_numel * (n_vocab_chunks > 1)
        sum_numel += min(vocab_size, chunk_vocab) * d_model * (n_token_chunks > 1)
    return Work(
        flops_fwd=2 * tokens * weight_numel,
        bytes_fwd=itemsize * (hidden_numel + weight_numel) + 8 * tokens * n_tiles,
        flops_bwd=6 * tokens * weight_numel,
        bytes_bwd=(
            3 * itemsize * tokens * vocab_size
            + itemsize * (2 * hidden_numel * n_vocab_chunks + 2 * weight_numel * n_token_chunks)
            + 8 * (hidden_numel * (n_vocab_chunks - 1) + weight_numel * (n_token_chunks - 1))
            + itemsize * (hidden_numel + weight_numel)
        ),
        extra_bytes_fwd=4 * tokens * n_tiles,
        extra_bytes_bwd=itemsize * min(tokens, chunk_tokens) * padded + 4 * sum_numel,
    )


def materialised(tokens: int, vocab_size: int, d_model: int, itemsize: int) -> Work:
    """Work of PyTorch's linear layer, cast to fp32 and cross-entropy, run one after another."""
    logits, operands = tokens * vocab_size, itemsize * (tokens + vocab_size) * d_model
    cast = logits * (4 + itemsize) if itemsize < 4 else 0
    return Work(
        flops_fwd=2 * logits * d_model,
        bytes_fwd=operands + itemsize * logits + cast + 8 * logits,
        flops_bwd=4 * logits * d_model,
        bytes_bwd=2 * operands + 4 * logits + 12 * logits + cast + 2 * itemsize * logits,
        extra_bytes_fwd=8 * logits,
        extra_bytes_bwd=12 * logits,
    )


def fused(tokens: int, vocab_size: int, d_model: int, itemsize: int) -> Work:
    """Lower bound for any implementation that stores the logits.

    The logits are written, read for the loss and read for their gradient, which replaces them and is read twice.
    """
    logits, operands = tokens * vocab_size, itemsize * (tokens + vocab_size) * d_model
    return Work(
        flops_fwd=2 * logits * d_model,
        bytes_fwd=operands + 2 * itemsize * logits,
        flops_bwd=4 * logits * d_model,
        bytes_bwd=2 * operands + 4 * itemsize * logits,
        extra_bytes_fwd=itemsize * logits,
        extra_bytes_bwd=itemsize * logits,
    )
