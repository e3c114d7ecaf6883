"""The reference for `quantize`: one block at a time, in numpy's fp32, rounding by look-up among all values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from explore.precision import ELEMENTS, FORMATS, Format

Array = npt.NDArray[np.float32]
ONE, FLOAT_MAX = np.float32(1), np.finfo(np.float32).max


def quantize_plain(
    x: Float[Tensor, "*dims"],
    format: str,
    noise: Float[Tensor, "*dims"] | None = None,
    *,
    block_axis: int = -1,
    square: bool = False,
    per_expert: bool = False,
    four_over_six: bool = False,
    scale_rounding: str = "nearest",
) -> Float32[Tensor, "*dims"]:
    """Computes `quantize` for valid arguments and formats of up to 8 bits per element, except the format `e8m0`.

    Args:
        noise: from `rounding_noise` for stochastic rounding; rounding to nearest if absent.
    """
    entry, y = FORMATS[format], x.float().numpy(force=True).copy()
    uniform = None if noise is None else (noise.numpy(force=True).astype(np.float64) + 2**15 + 0.5) / 2**16
    axes = () if not entry.block else (x.ndim - 2, x.ndim - 1) if square else (block_axis % x.ndim,)
    with np.errstate(all="ignore"):
        for tensor in [np.s_[i : i + 1] for i in range(len(y))] if per_expert else [np.s_[:]]:
            part, amax = y[tensor], np.abs(y[tensor]).max()
            for block in _blocks(part.shape, axes, entry.block):
                u = None if uniform is None else uniform[tensor][block]
                part[block] = _block(part[block], entry, amax, u, four_over_six, scale_rounding)
    return torch.from_numpy(y)


def _blocks(shape: tuple[int, ...], axes: tuple[int, ...], block: int) -> Iterator[tuple[slice, ...]]:
    """Yields the slices of every block. Axes that blocks do not lie along are cut into single elements.

    Without `axes` there is one block: the whole tensor.
    """
    if not axes:
        yield tuple(slice(None) for _ in shape)
        return
    sizes = [block if axis in axes else 1 for axis in range(len(shape))]
    for starts in product(*(range(0, n, size) for n, size in zip(shape, sizes, strict=True))):
        yield tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _block(
    x: Array, entry: Format, amax_tensor: np.float32, uniform: npt.NDArray[np.float64] | None, four: bool, scale: str
) -> Array:
    amax, largest = np.abs(x).max(), np.float32(ELEMENTS[entry.element].largest)
    if entry.scaling == "none":
        return _rounded(x, entry.element, uniform)
    if entry.scaling == "e8m0":
        power = amax if np.isnan(amax) else _power_of_two_above(amax / largest)
        factor = ONE if power == np.float32(2.0**-127) else ONE / power
        return _rounded(x * factor, entry.element, uniform) * power
    if entry.scaling != "e4m3":
        factor = min(largest / amax, FLOAT_MAX) if 0 < amax < np.inf else ONE
        if entry.scaling == "power":
            factor = np.ldexp(ONE, np.frexp(factor)[1] - 1)
        return _rounded(x * factor, entry.element, uniform) / factor
    bound = np.float32(6 * (256 if four else 448))
    S = np.minimum(bound / amax_tensor, FLOAT_MAX)
    if amax_tensor == 0 or S == 0:
        S = ONE
    wanted = amax / np.float32(6) * S if four else amax * (S * np.float32(1 / 6))
    rounded = [_block_scale(wanted, scale), _block_scale(wanted * np.float32(1.5), scale)]

    def dequantized(s_b: np.float32, uniform: npt.NDArray[np.float64] | None) -> Array:
        elements = _rounded(x * np.minimum(ONE / (s_b * (ONE / S)), FLOAT_MAX), "e2m1", uniform)
        return np.asarray(elements * s_b / S, np.float32)

    if not four:
        return dequantized(rounded[0], uniform)
    six_error, four_error = (float(((dequantized(s_b, None) - x) ** 2).sum(dtype=np.float64)) for s_b in rounded)
    return dequantized(rounded[four_error < six_error], uniform)


def _block_scale(wanted: np.float32, rounding: str) -> np.float32:
    """The nearest E4M3 number, or the smallest that is at least `wanted`."""
    if rounding == "nearest" or np.isnan(wanted):
        return np.float32(_rounded(np.array(wanted), "e4m3", None))
    values = _values("e4m3")
    return np.float32(values[min(int(np.searchsorted(values, wanted)), len(values) - 1)])


def _power_of_two_above(wanted: np.float32) -> np.float32:
    """The smallest power of two from 2^-127 to 2^127 that is at least `wanted`."""
    powers = np.ldexp(ONE, np.arange(-127, 128))
    return np.float32(powers[min(int(np.searchsorted(powers, wanted)), len(powers) - 1)])


@cache
def _values(element: str) -> Array:
    """All nonnegative values of an element, in the order of their codes."""
    bits, mantissa, min_exponent, largest = ELEMENTS[element]
    if element == "int8":
        return np.arange(128, dtype=np.float32)
    exponents, fractions = np.divmod(np.arange(2 ** (bits - 1)), 2**mantissa)
    significands = np.where(exponents > 0, fractions + 2**mantissa, fractions)
    values = np.ldexp(significands.astype(np.float64), np.maximum(exponents, 1) - 1 + min_exponent - mantissa)
    return np.asarray(values[values <= largest], np.float32)


def _rounded(x: Array, element: str, uniform: npt.NDArray[np.float64] | None) -> Array:
    """Rounds to the nearest value, ties to the even code; with `uniform`, up with the probability of the remainder."""
    values = _values(element).astype(np.float64)
    magnitude = np.minimum(np.abs(x).astype(np.float64), values[-1])
    low = np.clip(np.searchsorted(values, magnitude, side="right") - 1, 0, len(values) - 2)
    rest = (magnitude - values[low]) / (values[low + 1] - values[low])
    goes_up = (rest > 0.5) | ((rest == 0.5) & (low % 2 == 1)) if uniform is None else uniform < rest
    rounded = np.copysign(values[low + goes_up], x).astype(np.float32)
    return np.where(np.isnan(x), x, rounded)
