"""Linear layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from explore.ops.paths import OpPath, declare, path_of

declare(
    "linear",
    OpPath("transposed", default_on="cpu", countable=True, backward=False),
    OpPath("plain", default_on="any", reference=True, countable=True),
    OpPath("vectors", backward=False, decoding=True),
)


FEW_ROWS = 32
"""Rows of a product up to which its transpose is faster on a CPU: few, as where a batch is decoded."""

VECTOR = 16
"""Numbers in fp32 that a CPU multiplies at once; rows are padded to a multiple of it for loops over vectors."""


def linear(
    x: Float[Tensor, "*dims d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*dims d_out"]:
    """The product x W^T + b; of few rows in fp32 on a CPU, without gradients, as the transpose of W x^T."""
    if not _has_few_rows(x, weight) or (path := path_of("linear", x.device.type)) == "plain":
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, x.shape[-1]).T
    if path == "vectors" and 4 * columns.shape[1] > VECTOR and weight.is_contiguous():  # of fewer, padding costs more
        y = _by_vectors(weight, columns)
        y = y if bias is None else y + bias[:, None]
    else:
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    of_rows: Tensor = y.T.unflatten(0, x.shape[:-1])
    return of_rows


def _by_vectors(weight: Tensor, columns: Tensor) -> Tensor:
    """As a batch of one product, which torch compiles to loops of its own even where weights may change."""
    n = columns.shape[1]
    return torch.bmm(weight[None], F.pad(columns, (0, -n % VECTOR))[None])[0, :, :n]


def _has_few_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] < x.numel() <= FEW_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )
