"""Quantisation: the exact values of a tensor in a narrow format, in fp32.

A quantiser divides a tensor into blocks and computes a scale for each block. It scales the elements, rounds them to
values of the narrow element, and undoes the scaling.

Letters: x tensor, s_b scale of a block, S scale of the tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from explore.foreign import check_type
from explore.ops.compilation import compiled
from explore.ops.paths import OpPath, declare
from explore.ops.rounding import power_of_two_below, round_nearest, round_stochastic, round_up, rounding_noise
from explore.precision import ELEMENTS, FORMATS, Format

declare(
    "quantize",
    OpPath("plain", default_on="any", reference=True, countable=True),
    OpPath("compiled", compiled=True),
)

Rounding = Literal["nearest", "stochastic"]
ScaleRounding = Literal["nearest", "up"]

SCALED_AS_WHOLE = ("tensor", "e4m3")
"""Scalings with one fp32 number for the whole tensor."""

FLOAT_MAX = ELEMENTS["fp32"].largest
FOUR_OVER_SIX = 256
"""Largest block scale in NVFP4 with four over six: 1.5 times this scale is still an E4M3 number."""


class Blocks(NamedTuple):
    """How a tensor is divided into blocks and scaled; the fields are documented at `quantize`."""

    format: Format
    axis: int = -1
    square: bool = False
    per_expert: bool = False
    four_over_six: bool = False
    scale_rounding: ScaleRounding = "nearest"

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Axes that are cut into blocks, in order."""
        if not self.format.block:
            return ()
        return (ndim - 2, ndim - 1) if self.square else (self.axis % ndim,)


class _Scale(NamedTuple):
    """Factors of quantisation: y = rounded(x * encode) * times / over. Each operation rounds to fp32."""

    encode: Tensor | float
    times: Tensor | float = 1.0
    over: Tensor | float = 1.0


@torch.no_grad()
def quantize(
    x: Float[Tensor, "*dims"],
    format: str,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    block_axis: int = -1,
    square: bool = False,
    per_expert: bool = False,
    four_over_six: bool = False,
    scale_rounding: ScaleRounding = "nearest",
) -> Float32[Tensor, "*dims"]:
    """Quantises and dequantises a tensor. There is no gradient.

    If the length of an axis is not a multiple of the block, the last block is shorter. A block with a NaN becomes NaN,
    and in NVFP4 so does the whole tensor. In `fp8`, `fp8-blocks` and `int8`, a block with a NaN or an infinity has a
    scale of 1.

    Args:
        format: a name in `explore.precision.FORMATS`.
        generator: source of stochastic rounding, such as `rounding_generator(seed, step, layer, tensor)`.
        block_axis: axis along which blocks lie: the axis that the product sums over.
        square: blocks are squares on the last two axes, as for weights, so that both products use the same values.
        per_expert: the first axis counts experts, and each expert has its own scale of the tensor.
        four_over_six: for each block of NVFP4, tries the scales that map its largest magnitude to 6 and to 4, and keeps
            the one with the smaller squared error of nearest rounding.
        scale_rounding: rounding of an E4M3 scale. With `nearest` the largest elements of half the blocks saturate, by
            up to 1/16, so stochastic rounding keeps the mean of the tensor only with `up`.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: an unknown format or rounding, stochastic rounding without a generator, or blocks that do not fit
            the axes of `x`.

    Source: NVFP4, arXiv 2509.25149 and Transformer Engine; four over six, arXiv 2512.02010; MX formats, OCP
    microscaling 1.0 with scales rounded up; blocks of fp8, arXiv 2412.19437, section 3.3.
    """
    check_type(x, Tensor, "x must be a tensor")
    entry = _check(x, format, rounding, generator, block_axis, square, per_expert, four_over_six)
    if x.numel() == 0:
        return x.float()
    noise = None if generator is None or rounding == "nearest" else rounding_noise(x, generator)
    how = Blocks(entry, block_axis, square, per_expert, four_over_six, scale_rounding)
    return quantize_blocks(x, noise, how)


def _check(
    x: Tensor,
    format: str,
    rounding: str,
    generator: torch.Generator | None,
    block_axis: int,
    square: bool,
    per_expert: bool,
    four_over_six: bool,
) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    entry = FORMATS[format]
    if rounding == "stochastic":
        if generator is None:
            raise ValueError("generator must be given for stochastic rounding, such as rounding_generator(...)")
        if entry.element == "e8m0":
            raise ValueError("rounding of e8m0 must be nearest, got 'stochastic'")
    if four_over_six and entry.scaling != "e4m3":
        raise ValueError(f"four_over_six needs nvfp4, got {format!r}")
    if entry.block:
        if not -x.ndim <= block_axis < x.ndim:
            raise ValueError(f"block_axis must be from {-x.ndim} to {x.ndim - 1}, got {block_axis}")
        if square and x.ndim < 2:
            raise ValueError(f"square needs a tensor of at least 2 axes, got {x.ndim}")
    if per_expert and x.ndim < (3 if square else 2):
        raise ValueError(f"per_expert needs an axis of experts before the others, got a tensor of {x.ndim} axes")
    if per_expert and entry.block and not square and block_axis % x.ndim == 0:
        raise ValueError(f"block_axis must not be the axis of the experts, got {block_axis}")
    return entry


def quantize_blocks(
    x: Float[Tensor, "*dims"],
    noise: Float32[Tensor, "*dims"] | None,
    how: Blocks,
    amax: Float32[Tensor, "*ones"] | None = None,
    whole: bool = True,
) -> Float32[Tensor, "*dims"]:
    """Computes `quantize` for valid arguments. The random bits are one tensor, so it compiles as one region.

    Args:
        amax: largest magnitude of the tensor that each element belongs to, if `x` is part of a tensor or holds several.
            It broadcasts against `x` and is constant within a block.
        whole: undo the scale of the tensor too; without it, the result is `tensor_scale` times the values.
    """
    x = x.float()
    if how.format.scaling == "none":
        return _rounded(x, how.format.element, noise)
    axes = how.axes(x.ndim)
    blocks, scale = _scaled(x, how, amax)
    drawn = None if noise is None else split_blocks(noise, axes, how.format.block)[0]
    y = _rounded(blocks * scale.encode, how.format.element, drawn) * scale.times
    if whole or how.format.scaling not in SCALED_AS_WHOLE:
        y = y / scale.over
    return join_blocks(y, axes, x.shape)


def tensor_scale(amax: Float32[Tensor, "*ones"], how: Blocks) -> Float32[Tensor, "*ones"] | None:
    """The scale of a whole tensor in a format that has one, which is divided by last; else None.

    Args:
        amax: largest magnitude of the tensor.
    """
    match how.format.scaling:
        case "tensor":
            return torch.as_tensor(_to_largest(amax, how.format).over)
        case "e4m3":
            return _tensor_scale(amax, how.four_over_six)
        case _:
            return None


@torch.no_grad()
def quantize_compiled(
    x: Float[Tensor, "*dims"],
    noise: Float32[Tensor, "*dims"] | None,
    how: Blocks,
    amax: Float32[Tensor, "*ones"] | None = None,
    whole: bool = True,
) -> Float32[Tensor, "*dims"]:
    """Computes `quantize_blocks`, bit for bit, in one compiled region for all lengths of the first axis.

    The last block is padded before the region, in which a padded axis takes up to eight times as long.
    """
    shape, axes = x.shape, how.axes(x.ndim)
    x = _pad(x, axes, how.format.block)
    noise = None if noise is None else _pad(noise, axes, how.format.block)
    for each in (x, noise, amax):
        if each is not None and each.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(each, 0)
    y: Tensor = compiled(quantize_blocks)(x, noise, how, amax, whole)
    for axis in axes:
        y = y.narrow(axis, 0, shape[axis])
    return y


@torch.no_grad()
def count_lost(
    x: Float[Tensor, "*dims"],
    y: Float32[Tensor, "*dims"],
    how: Blocks,
    amax: Float32[Tensor, "*ones"] | None = None,
) -> Int64[Tensor, "3"]:
    """Returns three counts: elements that are not zero, those that became zero, and those that saturated.

    An element is saturated if it exceeds the largest value at its scale by more than the rounding of a scale in fp32.

    Args:
        y: result of `quantize_blocks` for `x`, with the same `how` and `amax`.
    """
    blocks, scale = _scaled(x.float(), how, amax)
    beyond = (blocks * scale.encode).abs() > ELEMENTS[how.format.element].largest * (1 + 2**-12)
    saturated = join_blocks(beyond, how.axes(x.ndim), x.shape) & (y != 0)
    return torch.stack([(x != 0).sum(), ((x != 0) & (y == 0)).sum(), saturated.sum()])


def _scaled(x: Tensor, how: Blocks, amax_tensor: Tensor | None) -> tuple[Tensor, _Scale]:
    """The tensor in blocks, and their scales."""
    entry, axes = how.format, how.axes(x.ndim)
    blocks, within = split_blocks(x, axes, entry.block)
    if entry.scaling == "none":
        return blocks, _Scale(1.0)
    tensor_axes = tuple(range(how.per_expert, blocks.ndim))
    if entry.scaling == "tensor" and amax_tensor is not None:
        return blocks, _to_largest(amax_tensor, entry)
    amax = blocks.abs().amax(within or tensor_axes, keepdim=True)
    if entry.scaling == "e8m0":
        return blocks, _shared_exponent(amax, entry.element)
    if entry.scaling != "e4m3":
        return blocks, _to_largest(amax, entry)
    whole = amax.amax(tensor_axes, keepdim=True) if amax_tensor is None else _in_blocks(amax_tensor, axes, entry.block)
    S = _tensor_scale(whole, how.four_over_six)
    return blocks, _two_scales(blocks, amax, S, within if how.four_over_six else (), how.scale_rounding)


def _rounded(x: Tensor, element: str, noise: Tensor | None) -> Tensor:
    return round_nearest(x, element) if noise is None else round_stochastic(x, element, noise)


def _to_largest(amax: Tensor, entry: Format) -> _Scale:
    """One fp32 scale that maps the largest magnitude to the largest value."""
    scale = _over(ELEMENTS[entry.element].largest, amax).clamp(max=FLOAT_MAX)
    if entry.scaling == "power":
        scale = power_of_two_below(scale)
    scale = torch.where(amax < torch.inf, scale, 1.0)
    return _Scale(scale, over=scale)


def _shared_exponent(amax: Tensor, element: str) -> _Scale:
    """The smallest power of two per block that is at least largest magnitude / largest value, in the range of E8M0.

    If the power is the smallest of that range, elements are not scaled up and nearly all become zero, as in hardware.
    """
    wanted = amax / ELEMENTS[element].largest
    scale = power_of_two_below(wanted)
    scale = torch.where(scale < wanted, scale * 2, scale).clamp(2.0**-127, 2.0**127)
    return _Scale(torch.where(scale == 2.0**-127, 1.0, scale.reciprocal()), times=scale)


def _tensor_scale(amax: Tensor, four_over_six: bool) -> Tensor:
    """Scale of a tensor in NVFP4: the largest block scale becomes the largest value that a block scale may have."""
    largest = FOUR_OVER_SIX if four_over_six else ELEMENTS["e4m3"].largest
    S = _over(largest * ELEMENTS["e2m1"].largest, amax).clamp(max=FLOAT_MAX)
    return torch.where((amax == 0) | (S == 0), 1.0, S)


def _two_scales(x: Tensor, amax: Tensor, S: Tensor, four_over_six: tuple[int, ...], scale_rounding: str) -> _Scale:
    """NVFP4: one E4M3 scale per block and one fp32 scale S per tensor. A block whose scale is 0 becomes 0.

    Args:
        four_over_six: axes within a block if each block takes the better of two scales; else empty.
    """
    # Each in Transformer Engine's order of operations; the other order gives some blocks another scale.
    wanted = amax / 6 * S if four_over_six else amax * (S * (1 / 6))
    s_b = _block_scale(wanted, scale_rounding)
    if four_over_six:
        larger = _block_scale(wanted * 1.5, scale_rounding)
        error, error_larger = (_squared_error(x, scale, S, four_over_six) for scale in (s_b, larger))
        s_b = torch.where(error_larger < error, larger, s_b)
    return _Scale(_encode(s_b, S), times=s_b, over=S)


def _encode(s_b: Tensor, S: Tensor) -> Tensor:
    return (s_b * S.reciprocal()).reciprocal().clamp(max=FLOAT_MAX)


def _squared_error(x: Tensor, s_b: Tensor, S: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Returns the squared error of rounding x to nearest with these scales, summed over `axes`."""
    y = _rounded(x * _encode(s_b, S), "e2m1", None) * s_b / S
    return (y - x).square().sum(axes, keepdim=True)


def _block_scale(wanted: Tensor, rounding: str) -> Tensor:
    return round_up(wanted, "e4m3") if rounding == "up" else round_nearest(wanted, "e4m3")


def _over(number: float, x: Tensor) -> Tensor:
    """Returns number / x, rounded once. Torch computes `number / x` with a rounded reciprocal."""
    return torch.full_like(x, number) / x


def _in_blocks(amax: Tensor, axes: tuple[int, ...], block: int) -> Tensor:
    """Reshapes `amax`, which broadcasts against the tensor and is constant within a block, for the tensor in blocks."""
    for axis in reversed(axes):
        every_block = (slice(None),) * axis + (slice(None, None, block),)
        amax = amax[every_block].unsqueeze(axis + 1)
    return amax


def split_blocks(x: Tensor, axes: tuple[int, ...], block: int) -> tuple[Tensor, tuple[int, ...]]:
    """Splits each of the axes into two, blocks and elements of a block; pads the last block with zeros.

    Returns:
        The blocks, and the axes within a block.
    """
    x = _pad(x, axes, block)
    for axis in reversed(axes):
        x = x.unflatten(axis, (-1, block))
    return x, tuple(axis + i + 1 for i, axis in enumerate(axes))


def _pad(x: Tensor, axes: tuple[int, ...], block: int) -> Tensor:
    """Pads the axes with zeros to whole blocks."""
    for axis in axes:
        if missing := -x.shape[axis] % block:
            x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing))
    return x


def join_blocks(x: Tensor, axes: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Undoes `split_blocks`."""
    for axis in axes:
        x = x.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])
    return x
