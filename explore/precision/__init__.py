"""Low precision as data: number formats, and recipes of which product is in which. Knows nothing of torch."""

from explore.precision.formats import ELEMENTS, FORMATS, Element, Format, FormatName, Scaling
from explore.precision.named import RECIPES, NamedRecipe, named, read_recipe
from explore.precision.recipe import HIGH, UNQUANTIZED, Operand, Place, Product, Recipe, Rule, Until, WeightFormat

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "HIGH",
    "RECIPES",
    "UNQUANTIZED",
    "Element",
    "Format",
    "FormatName",
    "NamedRecipe",
    "Operand",
    "Place",
    "Product",
    "Recipe",
    "Rule",
    "Scaling",
    "Until",
    "WeightFormat",
    "named",
    "read_recipe",
]
