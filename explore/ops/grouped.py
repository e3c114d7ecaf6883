"""Products of rows that are sorted by expert with the weights of their expert, each exactly as large as its load."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def grouped_product(
    rows: Float[Tensor, "choices d"], weight: Float[Tensor, "e d f"], loads: list[int]
) -> Float[Tensor, "choices f"]:
    """Rows times the weights of their expert. Each product writes into its slice of one result.

    Args:
        loads: rows of each expert.
    """
    y = rows.new_empty(len(rows), weight.shape[2])
    # An expert without a token has an empty slice, and its product does nothing.
    for into, tokens, one in zip(y.split(loads), rows.split(loads), weight, strict=True):
        torch.mm(tokens, one, out=into)
    return y


def grouped_outer(
    rows: Float[Tensor, "choices d"], other: Float[Tensor, "choices f"], loads: list[int]
) -> Float[Tensor, "e d f"]:
    """Transposed rows times other rows, expert by expert: zeros for an expert without a token."""
    result = rows.new_empty(len(loads), rows.shape[1], other.shape[1])
    for tokens, given, into in zip(rows.split(loads), other.split(loads), result, strict=True):
        torch.mm(tokens.T, given, out=into)  # (d, load) (load, f)
    return result
