"""Number formats: values of an element, elements that share a scale, and the bits of both."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

FormatName = Literal[
    "fp32", "bf16", "fp16", "e5m2", "e4m3", "e2m1", "e8m0",
    "fp8", "fp8-e5m2", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4", "int8",
]  # fmt: skip
Scaling = Literal["none", "tensor", "block", "power", "e8m0", "e4m3"]


class Element(NamedTuple):
    """The values that one element can take.

    Attributes:
        bits: bits of an element.
        mantissa: bits of the fraction; an integer has none and a step of 1.
        min_exponent: exponent of the smallest normal value.
        largest: largest finite value.
    """

    bits: int
    mantissa: int
    min_exponent: int
    largest: float


class Format(NamedTuple):
    """An element type and how elements share a scale.

    Attributes:
        name: name in recipes and tables.
        element: name of the element in `ELEMENTS`.
        scaling: the factors on elements. `none`: no factor. `tensor`: one fp32 number that maps the largest magnitude
            to `largest`. `block`: one such number per block. `power`: the same, rounded down to a power of two. `e8m0`:
            one power of two per block, rounded so that nothing saturates. `e4m3`: one E4M3 number per block, and one
            fp32 number for the tensor.
        block: elements along an axis that share a scale; 0 without blocks.
        stored_block: elements of a weight per stored scale, if blocks of weights are squares.
    """

    name: FormatName
    element: str
    scaling: Scaling
    block: int = 0
    stored_block: int = 0

    @property
    def bits_per_element(self) -> float:
        """Bits per weight including its share of the block's scale; a single scale of a whole tensor is not counted."""
        return self._bits_with_scale_of(self.stored_block)

    @property
    def bits_in_rows(self) -> float:
        """The same if blocks of weights lie along one axis."""
        return self._bits_with_scale_of(self.block)

    @property
    def fits_bf16(self) -> bool:
        """Whether bf16 holds every value exactly, apart from one factor that the whole tensor shares."""
        return self.scaling != "block" and ELEMENTS[self.element].mantissa <= ELEMENTS["bf16"].mantissa

    def _bits_with_scale_of(self, n_elements: int) -> float:
        bits = ELEMENTS[self.element].bits
        return bits + SCALE_BITS[self.scaling] / n_elements if n_elements else bits


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        "fp32": Element(32, 23, -126, 3.4028234663852886e38),
        "bf16": Element(16, 7, -126, 3.3895313892515355e38),
        "fp16": Element(16, 10, -14, 65504.0),
        "e5m2": Element(8, 2, -14, 57344.0),
        "e4m3": Element(8, 3, -6, 448.0),
        "e2m1": Element(4, 1, 0, 6.0),
        "e8m0": Element(8, 0, -127, 2.0**127),
        "int8": Element(8, 0, 0, 127.0),
    }
)

SCALE_BITS: Mapping[Scaling, int] = MappingProxyType(
    {"none": 0, "tensor": 0, "block": 32, "power": 32, "e8m0": 8, "e4m3": 8}
)
"""Bits of the scale of a block."""

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Format("fp32", "fp32", "none"),
            Format("bf16", "bf16", "none"),
            Format("fp16", "fp16", "none"),
            Format("e5m2", "e5m2", "none"),
            Format("e4m3", "e4m3", "none"),
            Format("e2m1", "e2m1", "none"),
            Format("e8m0", "e8m0", "none"),
            Format("fp8", "e4m3", "tensor"),
            Format("fp8-e5m2", "e5m2", "tensor"),
            Format("fp8-blocks", "e4m3", "power", 128, 128 * 128),
            Format("mxfp8", "e4m3", "e8m0", 32, 32),
            Format("mxfp4", "e2m1", "e8m0", 32, 32),
            Format("nvfp4", "e2m1", "e4m3", 16, 16),
            Format("int8", "int8", "block", 128, 128),
        )
    }
)

UNQUANTIZED = frozenset({"fp32", "bf16", "fp16"})
"""Wide formats: products in them are computed directly."""
