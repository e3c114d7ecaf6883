"""Short causal depthwise convolution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from explore.ops.compilation import compiled
from explore.ops.paths import OpPath, declare, path_of

declare(
    "conv",
    OpPath("shift", default_on="cpu"),
    OpPath("conv1d", default_on="any", reference=True, countable=True),
    OpPath("compiled", compiled=True),
)


def causal_conv1d(
    x: Float[Tensor, "batch seq channels"],
    weight: Float[Tensor, "channels 1 d_conv"],
    bias: Float[Tensor, " channels"] | None,
    before: Float[Tensor, "batch past channels"] | None = None,
) -> Float[Tensor, "batch seq channels"]:
    """Convolves each channel with its own filter over the current position and the `d_conv` - 1 positions before it.

    The default path on a CPU sums shifted products. For these shapes that is three times as fast as `conv1d`.

    Args:
        before: inputs at the `d_conv` - 1 positions before the first; zero if absent.
    """
    padded = F.pad(x, (0, 0, weight.shape[2] - 1, 0)) if before is None else torch.cat((before.to(x.dtype), x), dim=1)
    if path_of("conv", x.device.type) == "conv1d":
        return F.conv1d(padded.transpose(1, 2), weight, bias, groups=weight.shape[0]).transpose(1, 2)
    shift = compiled(_shifted) if path_of("conv", x.device.type) == "compiled" else _shifted
    taps = weight[:, 0].T.to(padded.dtype).contiguous()  # outside compiled code, where each loop would transpose them
    return shift(padded, taps, taps.new_zeros(taps.shape[1]) if bias is None else bias.to(padded.dtype))


def _shifted(padded: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = _Shifted.apply(padded, taps, bias)  # type: ignore[no-untyped-call]
    return y


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        padded: Float[Tensor, "batch padded channels"],
        taps: Float[Tensor, "d_conv channels"],
        bias: Float[Tensor, " channels"],
    ) -> Float[Tensor, "batch seq channels"]:
        ctx.save_for_backward(padded, taps)
        return reduce(lambda y, each: torch.addcmul(y, *each), _windows(padded, taps), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        padded, taps = ctx.saved_tensors
        dpadded = torch.zeros_like(padded)
        for into, tap in _windows(dpadded, taps):
            into.addcmul_(tap, dy)
        products = torch.empty_like(dy)
        dtaps = torch.stack([torch.mul(x, dy, out=products).sum((0, 1)) for x, _ in _windows(padded, taps)])
        return dpadded, dtaps, dy.sum((0, 1)) if ctx.needs_input_grad[2] else None


def _windows(padded: Tensor, taps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each tap with the slice of the padded sequence that it multiplies; the slice is as long as the output."""
    seq = padded.shape[1] - len(taps) + 1
    return ((padded[:, i : i + seq], tap) for i, tap in enumerate(taps))
