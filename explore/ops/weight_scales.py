"""Weights of a trained model in a narrow format, with scales chosen by one of several criteria."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from explore.ops.quantize import Blocks, join_blocks, quantize_blocks, split_blocks
from explore.ops.rounding import rounding_noise
from explore.precision import FORMATS

Scales = Literal["max", "mse", "four_over_six"]
"""Criteria for the scale of a block: its largest magnitude, or the smallest squared error. `four_over_six` compares the
squared errors of two scales, in formats that have them."""
SCALES: tuple[Scales, ...] = get_args(Scales)

CLIPS = tuple(1 - i / 16 for i in range(9))
"""Fractions of a block's largest magnitude that are tried as its clipping value."""


@torch.no_grad()
def quantize_weight(
    weight: Float[Tensor, "*dims"],
    format: str,
    scales: Scales = "max",
    *,
    block_axis: int = -1,
    square: bool = False,
    per_expert: bool = False,
    generator: torch.Generator | None = None,
) -> Float32[Tensor, "*dims"]:
    """Returns the weight quantised and dequantised.

    With `mse`, a block is clipped at several fractions of its largest magnitude, and the one with the smallest squared
    error is kept. In NVFP4 the scale of the whole tensor always follows from its largest magnitude.

    Args:
        block_axis: axis that the product sums over.
        generator: source of stochastic rounding; without it, rounding is to nearest.

    Source: four over six, arXiv 2512.02010; a search by squared error as for the routed experts of Nemotron 3 Super.
    """
    entry = FORMATS[format]
    how = Blocks(entry, block_axis, square, per_expert, scales == "four_over_six" and entry.scaling == "e4m3")
    noise = None if generator is None else rounding_noise(weight, generator)
    if scales != "mse" or entry.scaling == "none":
        return quantize_blocks(weight, noise, how)
    x = weight.float()
    # Blocks of the format, or the tensor of each expert if the format has no blocks.
    axes = how.axes(x.ndim)
    blocks, within = split_blocks(x, axes, entry.block)
    whole = tuple(range(per_expert, x.ndim))
    amax_block = blocks.abs().amax(within or whole, keepdim=True)
    amax = x.abs().amax(whole, keepdim=True) if entry.scaling == "e4m3" else None
    best, least = blocks, torch.full_like(amax_block, torch.inf)
    for share in CLIPS:
        clipped = join_blocks(blocks.clamp(-share * amax_block, share * amax_block), axes, x.shape)
        y, _ = split_blocks(quantize_blocks(clipped, noise, how, amax), axes, entry.block)
        error = (y - blocks).square().sum(within or whole, keepdim=True)
        best, least = torch.where(error < least, y, best), torch.minimum(error, least)
    return join_blocks(best, axes, x.shape)
