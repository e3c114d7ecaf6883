"""The products of one component under a recipe: how every operand is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Literal, NamedTuple

from explore.number_formats import ELEMENTS, FORMATS, FormatName
from explore.precision.recipe import Operand, Product, Recipe

OPERANDS: Mapping[Product, tuple[Operand, Operand]] = {
    "forward": ("x", "w"),
    "input_gradient": ("dy", "w"),
    "weight_gradient": ("x", "dy"),
}
"""The two operands of every product of a linear layer."""

GRADIENT_FORMATS: Mapping[FormatName, FormatName] = {"fp8": "fp8-e5m2"}
"""Formats of gradients where they differ from those of weights and activations (Transformer Engine)."""


class OperandFormat(NamedTuple):
    """How an operand of a product is quantised.

    Attributes:
        format: None leaves the operand as it is.
        stochastic: rounded stochastically.
        hadamard: elements of the blocks that are rotated before; 0 for no rotation.
        square: scales are for squares of a weight.
        four_over_six: blocks take the better of two scales.
        scale_rounding: rounding of E4M3 scales.
    """

    format: FormatName | None = None
    stochastic: bool = False
    hadamard: int = 0
    square: bool = False
    four_over_six: bool = False
    scale_rounding: Literal["nearest", "up"] = "nearest"

    @property
    def grain(self) -> int:
        """Elements that an axis must be a multiple of, so that neither a block nor a rotation is cut."""
        return lcm(self.hadamard or 1, FORMATS[self.format].block or 1 if self.format else 1)

    @property
    def has_no_axis(self) -> bool:
        """Whether a weight has the same values whichever axis a product sums over."""
        return not self.hadamard and (self.square or self.format is None or not FORMATS[self.format].block)


Products = Mapping[Product, tuple[OperandFormat, OperandFormat]]
"""Operands of the products that are quantised; others are made in the dtype of the run."""


def products_of(recipe: Recipe, format: FormatName) -> Products:
    """The products of a component that has this format, as the recipe's switches want them."""
    return {
        product: (_operand(recipe, format, product, left), _operand(recipe, format, product, right))
        for product, (left, right) in OPERANDS.items()
        if getattr(recipe, product)
    }


def _operand(recipe: Recipe, format: FormatName, product: Product, operand: Operand) -> OperandFormat:
    name: FormatName = GRADIENT_FORMATS.get(format, format) if operand == "dy" else format
    entry = FORMATS[name]
    if entry.scaling == "none":
        return OperandFormat(name)
    # What a recipe says of rounding is about its format and about 4 bits, not about wider formats of some components.
    applies = format == recipe.format or ELEMENTS[entry.element].bits < 8
    stochastic = applies and operand in recipe.stochastic
    is_square = recipe.square_weights if applies else entry.scaling == "power"
    return OperandFormat(
        name,
        stochastic,
        recipe.hadamard_size if applies and product in recipe.hadamard else 0,
        operand == "w" and is_square and entry.block > 0,
        entry.scaling == "e4m3" and operand in recipe.four_over_six,
        recipe.scale_rounding if stochastic else "nearest",
    )


def products_at(recipe: Recipe, step: int, n_steps: int) -> frozenset[Product]:
    """The products that the recipe's `until` lets be quantised after so many of all steps, and after the last one."""
    until = recipe.until
    shares: dict[Product, float] = {
        "forward": until.forward, "input_gradient": until.backward, "weight_gradient": until.backward
    }  # fmt: skip
    return frozenset(product for product, share in shares.items() if share == 1 or step < round(share * n_steps))
