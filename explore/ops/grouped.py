"""Products of rows, sorted by expert, with the weights of their expert, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def grouped_product(
    rows: Float[Tensor, "choices d"], weight: Float[Tensor, "e d f"], loads: list[int]
) -> Float[Tensor, "choices f"]:
    """Multiplies rows by the weights of their expert. Each product writes to its slice of one result.

    Args:
        loads: number of rows of each expert.
    """
    y = rows.new_empty(len(rows), weight.shape[2])
    # An expert without tokens has an empty slice, so its product does nothing.
    for into, tokens, one in zip(y.split(loads), rows.split(loads), weight, strict=True):
        torch.mm(tokens, one, out=into)
    return y


def grouped_outer(
    rows: Float[Tensor, "choices d"], other: Float[Tensor, "choices f"], loads: list[int]
) -> Float[Tensor, "e d f"]:
    """Multiplies the transposed rows of each expert by its rows of `other`; without rows the result is 0."""
    result = rows.new_empty(len(loads), rows.shape[1], other.shape[1])
    for tokens, given, into in zip(rows.split(loads), other.split(loads), result, strict=True):
        torch.mm(tokens.T, given, out=into)  # (d, load) (load, f)
    return result


@contextmanager
def bf16_instructions() -> Iterator[None]:
    """Lets a CPU read fp32 operands of products as bf16, which changes no number that fits bf16. Sums stay in fp32."""
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
