"""Sensitivities: the KL divergence when only one component is quantised to one format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

from explore.cost import BITS, MTP_LETTER, Ledger, in_formats, storage
from explore.model import Component, QuantizedModel
from explore.precision import FormatName, Recipe, Rule
from explore.quantizing.choosing import Choice
from explore.quantizing.request import Quantization
from explore.quantizing.scoring import Reference

Sensitivities = dict[str, dict[str, float]]
"""Sensitivity in nats per token, by component and format."""


class Offer(NamedTuple):
    """A component whose format can be chosen, with its number of parameters."""

    component: Component
    params: int


def offers(ledger: Ledger, request: Quantization) -> list[Offer]:
    """Returns the components whose formats can be chosen: all matrices of the main model.

    Raises:
        ValueError: a format's block does not divide a width, or no choice of formats reaches the requested bits.
    """
    found = [
        Offer(Component(row.layer, row.letter, row.entry.component), row.entry.params)
        for row in ledger
        if row.entry.blocks_along and row.entry.params and row.letter != MTP_LETTER
    ]
    least = float("inf")
    for format in sorted(request.formats, key=BITS.__getitem__, reverse=True):
        chosen: dict[str, FormatName] = {str(offer.component): format for offer in found}
        least = storage(in_formats(ledger, recipe_with(Recipe(), found, chosen)))["bits_per_element"]
    if request.bits is not None and request.bits < least:
        raise ValueError(
            f"bits must be at least {ceil(1000 * least) / 1000}, which {', '.join(request.formats)} reach with "
            f"norms, convolutions and multi-token prediction in bf16, got {request.bits:g}"
        )
    return found


def bits_of(found: Sequence[Offer], formats: Sequence[FormatName]) -> dict[str, dict[str, float]]:
    """Returns the bits of every component's weights, by format."""
    return {str(each.component): {format: each.params * BITS[format] for format in formats} for each in found}


def recipe_with(base: Recipe, found: Sequence[Offer], formats: dict[str, FormatName]) -> Recipe:
    """Returns a recipe with the given formats; components in the high format of `base` need no rule."""
    layers: dict[tuple[str, FormatName], list[int]] = {}
    rules = []
    for component, _ in found:
        format = formats[str(component)]
        if format == base.high:
            continue
        if component.layer is None:
            rules.append(Rule.model_validate({"format": format, "components": (component.name,)}))
        else:
            layers.setdefault((component.name, format), []).append(component.layer)
    for (name, format), where in layers.items():
        rules.append(Rule.model_validate({"format": format, "components": (name,), "layers": tuple(where)}))
    return base.model_copy(update={"rules": tuple(rules)})


def measure(
    quantized: QuantizedModel,
    reference: Reference,
    found: Sequence[Offer],
    formats: Sequence[FormatName],
    known: Sensitivities,
    save: Callable[[Sensitivities], None],
    report: Callable[[str], None],
) -> Sensitivities:
    """Measures all missing sensitivities.

    Args:
        known: earlier measurements, extended in place.
        save: called after every measurement.
        report: callback for progress messages.
    """
    for i, (component, _) in enumerate(found):
        row = known.setdefault(str(component), {})
        for format in formats:
            if format not in row:
                report(f"sensitivity of {component} in {format}, {i + 1} of {len(found)}")
                quantized.put(component, format)
                row[format] = reference.compare(quantized.model).kl
                quantized.put(component, None)
                save(known)
    return known


def with_high(found: Sequence[Offer], measured: Sensitivities, formats: Sequence[FormatName]) -> Sensitivities:
    """Returns the sensitivities of the offered formats, with 0 for bf16."""
    return {
        str(component): {"bf16": 0.0} | {format: measured[str(component)][format] for format in formats}
        for component, _ in found
    }


def record_of(choice: Choice, other_bits: float, n_params: int) -> dict[str, float | str]:
    """Returns the record of a choice, without its formats.

    Args:
        other_bits: bits of all weights with a fixed format.
        n_params: number of parameters of the whole model.
    """
    bits_per_element = (choice.bits + other_bits) / n_params
    return {"status": choice.status, "sensitivity": choice.sensitivity, "bits_per_element": bits_per_element}
