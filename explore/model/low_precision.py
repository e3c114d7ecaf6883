"""A model under a precision recipe: attaches quantisers to its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from explore.blocks import Linear, RoutedMixer
from explore.cost import MTP_LETTER, in_formats
from explore.model.language_model import LanguageModel
from explore.model.layer import Layer
from explore.ops import Emulation, Quantizer
from explore.precision import Recipe, products_of


class QuantizablePart(NamedTuple):
    """A module whose products may be quantised, with its ledger component.

    Attributes:
        layer: index in the ledger; None for the head and for multi-token prediction.
        name: module name within its layer, or within the model if it is outside the layers.
    """

    layer: int | None
    letter: str
    component: str
    name: str
    module: Linear | RoutedMixer


def quantizable_parts(model: LanguageModel) -> Iterator[QuantizablePart]:
    """All modules whose products may be quantised."""
    for i, (letter, layer) in enumerate(zip(model.config.pattern, model.layers, strict=True)):
        assert isinstance(layer, Layer)
        yield from _parts(i, letter, layer.mixer, "")
    for k, depth in enumerate(model.mtp):
        for name, child in depth.named_children():
            if isinstance(child, nn.ModuleList):
                for j, layer in enumerate(child):
                    assert isinstance(layer, Layer)
                    yield from _parts(None, MTP_LETTER, layer.mixer, f"mtp.{k}.layers.{j}.")
            elif isinstance(child, Linear):
                yield QuantizablePart(None, MTP_LETTER, name, f"mtp.{k}.{name}", child)
    yield QuantizablePart(None, "", "head", "head", model.head)


def _parts(i: int | None, letter: str, mixer: nn.Module, prefix: str) -> Iterator[QuantizablePart]:
    for name, module in mixer.named_modules():
        if isinstance(module, Linear):
            yield QuantizablePart(i, letter, name.partition(".")[0], prefix + name, module)
        elif isinstance(module, RoutedMixer):
            yield QuantizablePart(i, letter, "experts", f"{prefix}experts", module)


def quantize_products(model: LanguageModel, recipe: Recipe, seed: int = 0) -> Emulation:
    """Attaches a quantiser to every module whose component is not in the recipe's high format; removes all others.

    Returns:
        Settings shared by the quantisers: seed, step, and which products are quantised.

    Raises:
        ValueError: the recipe does not fit the model.
    """
    emulation = Emulation(seed)
    format_of = {
        (row.layer, row.letter, row.entry.component): row.entry.weight
        for row in in_formats(model.config.ledger(1), recipe)
    }
    for part in quantizable_parts(model):
        format = format_of[part.layer, part.letter, part.component]
        part.module.quantizer = None
        if format is not None and format != recipe.high:
            layer = "outside" if part.layer is None else part.layer
            products = products_of(recipe, format)
            component = (part.letter, part.component)
            part.module.quantizer = Quantizer(format, products, emulation, layer, part.name, component)
    return emulation
