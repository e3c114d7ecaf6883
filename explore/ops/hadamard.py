"""The random Hadamard transform, which spreads an outlier over its block before the block is quantised."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Random signs, the same for all layers and steps; they are those of Transformer Engine."""


@torch.no_grad()
def hadamard(x: Float[Tensor, "*dims"], axis: int = -1, size: int = len(SIGNS)) -> Float32[Tensor, "*rotated"]:
    """Rotates blocks along an axis by H = diag(signs) H_size / sqrt(size), in bf16 with sums in fp32.

    The axis is padded with zeros to whole blocks and stays padded. Since H H^T = 1, the product of two rotated tensors
    over that axis is the product of the tensors. There is no gradient.

    Args:
        size: number of elements in a block, a power of two; the signs are repeated or cut to this length.

    Raises:
        ValueError: `x` does not have the axis, or `size` is not a power of two.

    Source: arXiv 2509.25149, section 4.2. Transformer Engine takes bf16, so fp32 is rounded to bf16 first.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be from {-x.ndim} to {x.ndim - 1}, got {axis}")
    axis %= x.ndim
    if missing := -x.shape[axis] % size:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing))
    matrix = torch.tensor(hadamard_matrix(size), dtype=torch.bfloat16, device=x.device)
    blocks = x.to(torch.bfloat16).unflatten(axis, (-1, size))
    # The product itself rounds to bf16. A separate cast to bf16 and back would be removed by the compiler.
    rotated = blocks @ matrix if axis == x.ndim - 1 else matrix.T @ blocks.flatten(axis + 2)
    result: Tensor = rotated.reshape(x.shape).float()
    return result


def hadamard_matrix(size: int) -> list[list[float]]:
    """The rows of H, which are orthonormal. If `size` is a power of four, the elements are exact in any format.

    Raises:
        ValueError: `size` is not a power of two.
    """
    if size < 1 or size.bit_count() != 1:
        raise ValueError(f"size must be a power of two, got {size}")
    return [
        [SIGNS[row % len(SIGNS)] * (-1) ** (row & column).bit_count() / size**0.5 for column in range(size)]
        for row in range(size)
    ]
