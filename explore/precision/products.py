"""How the operands of one component's products are quantised under a recipe."""

from __future__ import annotations

import json
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
"""Gradient formats that differ from those of weights and activations (as in Transformer Engine)."""


class OperandFormat(NamedTuple):
    """How an operand of a product is quantised.

    Attributes:
        format: number format; None leaves the operand unchanged.
        stochastic: round stochastically.
        hadamard: block size of the Hadamard rotation before quantising; 0 for none.
        square: share one scale per square block of a weight.
        four_over_six: use the better of two scales per block.
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
        """Axis lengths must be a multiple of this, so that no block or rotation is cut."""
        return lcm(self.hadamard or 1, FORMATS[self.format].block or 1 if self.format else 1)

    @property
    def has_no_axis(self) -> bool:
        """Whether a weight's quantised values are the same for both summation axes."""
        return not self.hadamard and (self.square or self.format is None or not FORMATS[self.format].block)


Products = Mapping[Product, tuple[OperandFormat, OperandFormat]]
"""Operands of the quantised products; other products use the run's dtype."""


def products_of(recipe: Recipe, format: FormatName) -> Products:
    """Returns the products of a component in this format, under the recipe's settings."""
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
    # Rounding settings apply to the recipe's format and to 4-bit formats, not to wider formats of some components.
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


ROUNDING = ("stochastic", "hadamard", "hadamard_size", "square_weights", "four_over_six", "scale_rounding")
"""Fields of a recipe that say how operands are quantised."""


def unused_setting(recipe: Recipe) -> str | None:
    """Describes a setting that the recipe's formats cannot use; None if there is none.

    A setting of a product that is switched off counts as used, since it may come from the recipe's `base`.
    """
    formats = tuple(dict.fromkeys((recipe.format, *(rule.format for rule in recipe.rules))))
    whole, plain = recipe.model_copy(update=dict.fromkeys(OPERANDS, True)), Recipe()

    def products(one: Recipe) -> list[Products]:
        return [products_of(one, each) for each in formats]

    for field in (*OPERANDS, *ROUNDING):
        value, default = getattr(recipe, field), getattr(plain, field)
        if field in OPERANDS:
            is_used = any(format != recipe.high for format in formats)
        else:
            is_used = value == default or products(whole) != products(whole.model_copy(update={field: default}))
        if value != default and not is_used:
            where = f"no product in {' or '.join(formats)} uses it"
            return f"{field}: must be {json.dumps(default)}, since {where}, got {json.dumps(value)}"
    return None


def products_at(recipe: Recipe, step: int, n_steps: int) -> frozenset[Product]:
    """Returns the products that `since` and `until` allow to be quantised at a step.

    The state after the last step counts as a step.
    """
    if is_before(recipe, step, n_steps):
        return frozenset()
    until = recipe.until
    shares: dict[Product, float] = {
        "forward": until.forward, "input_gradient": until.backward, "weight_gradient": until.backward
    }  # fmt: skip
    return frozenset(product for product, share in shares.items() if share == 1 or step < round(share * n_steps))


def is_before(recipe: Recipe, step: int, n_steps: int) -> bool:
    """Whether a step comes before `since`, so that nothing is quantised in it, nor in any step before it."""
    return step < round(recipe.since * n_steps)
