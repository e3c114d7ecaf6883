"""Rounds fp32 numbers to the values of a narrow element: to nearest even, stochastically, or away from zero."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int16
from torch import Tensor

from explore.precision import ELEMENTS

BY_SPLITTING = frozenset({"e5m2", "e4m3", "e2m1"})
"""Elements that `round_nearest` rounds to by sums."""

SATURATING = frozenset({"e5m2", "e4m3", "e2m1", "int8"})
"""Elements that round larger numbers to their largest value; fp16 and bf16 overflow to infinity, as in IEEE 754."""


def rounding_generator(
    seed: int, step: int, layer: int | str, tensor: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator for the stochastic rounding of one tensor. A resumed run draws the same numbers as the first run.

    Args:
        seed: seed of the run.
        step: optimizer step.
        layer: index of the layer, or the name of a part outside the layers.
        tensor: name of the tensor, such as `in_proj dy`; if devices hold parts of it, the name of the part.
    """
    key = hashlib.blake2b(repr((seed, step, layer, tensor)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


def rounding_noise(x: Float[Tensor, "*dims"], generator: torch.Generator) -> Float32[Tensor, "*dims"]:
    """Draws a uniform integer from -2^15 to 2^15 - 1 for every element of `x`; probabilities are exact to 2^-17.

    They are converted to fp32, which torch compiles best.
    """
    return rounding_bits(x.numel(), generator).view(x.shape).float()


def rounding_bits(n: int, generator: torch.Generator) -> Int16[Tensor, " n"]:
    """Draws n integers of 16 bits as parts of integers of 64 bits, which torch draws fastest."""
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:n]


def round_nearest(x: Float[Tensor, "*dims"], element: str) -> Float[Tensor, "*dims"]:
    """Rounds to the nearest value of an element, ties to the even code.

    NaN stays NaN. In E8M0, zero and negative numbers become NaN.
    """
    if element == "fp32":
        return x
    if element == "e8m0":
        return torch.where(x > 0, x, torch.nan).to(torch.float8_e8m0fnu).float()
    if element in BY_SPLITTING:
        return _split(x, element)
    return _round(x, element, torch.round)


def _split(x: Tensor, element: str) -> Tensor:
    """Rounds by sums alone, which compile to vector instructions. Casts of torch do not: they take ten times as long.

    A sum of x and a number 2^23 times a step has no bits below the step, so subtracting the number leaves x rounded to
    the step. For subnormal values the step is fixed. For others the number is a multiple of x itself: Veltkamp's
    splitting (Dekker, 1971), which keeps the leading bits of a significand.
    """
    _, mantissa, min_exponent, largest = ELEMENTS[element]
    x = x.clamp(-largest, largest)
    multiple = x * (2.0 ** (23 - mantissa) + 1)
    normal = multiple - (multiple - x)
    number = 1.5 * 2.0 ** (23 + min_exponent - mantissa)
    subnormal = (x + number) - number
    return torch.copysign(torch.where(x.abs() < 2.0**min_exponent, subnormal, normal), x)


def round_stochastic(x: Float[Tensor, "*dims"], element: str, noise: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Rounds to one of the two neighbouring values, drawn so that the mean is `x`; above the largest value, to that.

    Args:
        noise: from `rounding_noise`.
    """
    if element == "fp32":
        return x
    uniform = (noise + (2**15 + 0.5)) / 2**16

    def drawn(steps: Tensor) -> Tensor:
        below = steps.floor()
        return below + (uniform < steps - below)

    return _round(x, element, drawn)


def round_up(x: Float[Tensor, "*dims"], element: str) -> Float[Tensor, "*dims"]:
    """Rounds to the nearest value of an element of at least the same magnitude, or to the largest value."""
    return _round(x, element, torch.ceil)


def power_of_two_below(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The largest power of two in fp32 that is at most `x`; 0 and NaN are unchanged.

    It uses a logarithm and an exponential, because they compile to vector instructions and operations on bits do not.
    Comparisons then correct a logarithm that was rounded to the wrong side of an integer.
    """
    power = x.log2().floor().clamp(max=127).exp2()
    power = torch.where(power > x, power / 2, power)
    return torch.where(power * 2 <= x, power * 2, power)


def _round(x: Tensor, element: str, to_integer: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounds magnitudes as multiples of the step between neighbouring values; division and product are exact."""
    saturates, largest = element in SATURATING, ELEMENTS[element].largest
    magnitude = x.abs().clamp(max=largest if saturates else ELEMENTS["fp32"].largest)
    step = value_spacing(magnitude, element)
    rounded = to_integer(magnitude / step) * step
    if not saturates:
        rounded = torch.where(rounded > largest, torch.inf, rounded)
    return torch.copysign(rounded, x)


def value_spacing(magnitude: Float[Tensor, "*dims"], element: str) -> Float[Tensor, "*dims"]:
    """Distance from a magnitude to the next larger value of the element."""
    if element == "int8":
        return torch.ones_like(magnitude)
    if element == "e2m1":
        return torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    smallest_normal = 2.0 ** ELEMENTS[element].min_exponent
    return power_of_two_below(magnitude.clamp(min=smallest_normal)) * 2.0 ** -ELEMENTS[element].mantissa
