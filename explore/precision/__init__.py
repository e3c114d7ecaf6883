"""Low precision as data: number formats, and recipes that assign them to products. Does not import torch."""

from explore.number_formats import ELEMENTS, FORMATS, UNQUANTIZED, Element, Format, FormatName, Scaling
from explore.precision.named import RECIPES, TRAINED, NamedRecipe, named, read_recipe
from explore.precision.products import (
    OPERANDS,
    OperandFormat,
    Products,
    is_before,
    products_at,
    products_of,
    unused_setting,
)
from explore.precision.recipe import HIGH, Operand, Place, Product, Recipe, Rule, Until, WeightFormat

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "HIGH",
    "OPERANDS",
    "RECIPES",
    "TRAINED",
    "UNQUANTIZED",
    "Element",
    "Format",
    "FormatName",
    "NamedRecipe",
    "Operand",
    "OperandFormat",
    "Place",
    "Product",
    "Products",
    "Recipe",
    "Rule",
    "Scaling",
    "Until",
    "WeightFormat",
    "is_before",
    "named",
    "products_at",
    "products_of",
    "read_recipe",
    "unused_setting",
]
