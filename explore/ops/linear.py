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
"""Maximum number of rows at which the transposed product is faster on a CPU, as for a batch in decoding."""

VECTOR = 16
"""Number of fp32 numbers that a CPU multiplies at once; loops over vectors pad the rows to a multiple of it."""


def linear(
    x: Float[Tensor, "*dims d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*dims d_out"]:
    """Returns x W^T + b. Few rows in fp32 on a CPU, without gradients, are computed as the transpose of W x^T."""
    if not _has_few_rows(x, weight) or (path := path_of("linear", x.device.type)) == "plain":
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, x.shape[-1]).T
    if path == "vectors" and 4 * columns.shape[1] > VECTOR and weight.is_contiguous():  # fewer rows: too much padding
        y = _by_vectors(weight, columns)
        y = y if bias is None else y + bias[:, None]
    else:
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    rows: Tensor = y.T.unflatten(0, x.shape[:-1])
    return rows


def _by_vectors(weight: Tensor, columns: Tensor) -> Tensor:
    """Computes W x^T as a batch of one product, which torch compiles to its own loops even if weights may change."""
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
