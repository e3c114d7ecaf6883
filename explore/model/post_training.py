"""Post-training quantisation: weights rounded to formats, and products with quantised inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from explore.blocks import RoutedMixer
from explore.cost import MTP_LETTER, in_formats
from explore.model.language_model import LanguageModel
from explore.model.low_precision import QuantizablePart, quantizable_parts
from explore.ops import (
    CalibratedQuantizer,
    Observer,
    Scales,
    StateRounding,
    quantize,
    quantize_weight,
    rounding_generator,
)
from explore.precision import UNQUANTIZED, FormatName, Recipe

Amax = Mapping[str, Mapping[str, Sequence[float]]]
"""Largest input magnitudes of products, by module, weight and expert."""

EMBEDDING = "embedding"
"""Ledger component of the embedding, and the model attribute that holds it."""


class Component(NamedTuple):
    """A ledger component: layer (None outside the layers), letter and name."""

    layer: int | None
    letter: str
    name: str

    def __str__(self) -> str:
        if self.layer is None:
            return f"mtp.{self.name}" if self.letter == MTP_LETTER else self.name
        return f"layers.{self.layer}.{self.name}"


class QuantizedModel:
    """A trained model whose components can be quantised and restored.

    Attributes:
        components: quantisable components with their modules. All depths of multi-token prediction share one
            component per name.
    """

    def __init__(
        self, model: LanguageModel, scales: Scales = "max", *, square_weights: bool = False, amax: Amax | None = None
    ) -> None:
        """Wraps a trained model.

        Args:
            scales: criterion for the scales of weights.
            square_weights: share one weight scale per square block.
            amax: input magnitudes from `calibrate`; without them only weights are quantised.
        """
        self.model, self.scales, self.square_weights, self.amax = model, scales, square_weights, amax
        self.components: dict[Component, list[QuantizablePart]] = {}
        for part in quantizable_parts(model):
            self.components.setdefault(Component(part.layer, part.letter, part.component), []).append(part)
        if not model.config.tie_embeddings:
            self.components[Component(None, "", EMBEDDING)] = []
        self._trained: dict[Component, list[Tensor]] = {}

    def put(self, component: Component, format: FormatName | None, *, seed: int | None = None) -> None:
        """Quantises one component, or restores its trained weights.

        Args:
            format: target format; None restores the trained weights.
            seed: seed of stochastic rounding of weights; None rounds to nearest.
        """
        weights = list(self._weights(component))
        kept = self._trained.setdefault(component, [weight.detach().clone() for weight, _, _ in weights])
        for (weight, axis, name), trained in zip(weights, kept, strict=True):
            new = trained if format is None else self._quantized(trained, format, axis, f"{component} {name}", seed)
            weight.data.copy_(new)
        for part in self.components[component]:
            part.module.quantizer = None if format is None else self._quantizer(part, format)

    def restore(self) -> None:
        """Restores all trained weights."""
        for component in self._trained:
            self.put(component, None)

    def apply(self, recipe: Recipe, seed: int = 0) -> None:
        """Quantises the whole model by a recipe, permanently.

        Weights without a format of their own, such as those of norms, are rounded to the recipe's high format. Decoding
        state is rounded to `recipe.kv` and `recipe.state`.

        Raises:
            ValueError: the recipe does not fit the model, or is for training only.
        """
        check_after_training(recipe)
        formats = formats_of_components(self.model, recipe)
        in_components = {id(weight) for component in self.components for weight, _, _ in self._weights(component)}
        for component in self.components:
            self.put(component, formats[component], seed=seed if "w" in recipe.stochastic else None)
        for parameter in self.model.parameters():
            if id(parameter) not in in_components:
                parameter.data.copy_(quantize(parameter, recipe.high))
        self._trained.clear()
        if recipe.kv is not None or recipe.state is not None:
            self.model.state_rounding = StateRounding(
                recipe.kv,
                recipe.state,
                recipe.kv_rounding == "stochastic",
                recipe.state_rounding == "stochastic",
                seed,
            )

    def _weights(self, component: Component) -> Iterator[tuple[Tensor, int, str]]:
        """Yields a component's matrices, the axis that products sum over, and a name."""
        if component.name == EMBEDDING:
            yield self.model.embedding.weight, -1, EMBEDDING
        for part in self.components[component]:
            if isinstance(part.module, RoutedMixer):
                for name, weight in part.module.named_parameters(recurse=False):
                    if weight.ndim == 3:  # (experts, d_in, d_out); biases have two axes
                        yield weight, 1, f"{part.name}.{name}"
            else:
                yield part.module.weight, -1, part.name

    def _quantized(self, weight: Tensor, format: FormatName, axis: int, name: str, seed: int | None) -> Tensor:
        generator = None if seed is None else rounding_generator(seed, 0, name, "w", weight.device)
        return quantize_weight(
            weight,
            format,
            self.scales,
            block_axis=axis,
            square=self.square_weights,
            per_expert=weight.ndim == 3,
            generator=generator,
        )

    def _quantizer(self, part: QuantizablePart, format: FormatName) -> CalibratedQuantizer | None:
        if self.amax is None or format in UNQUANTIZED:
            return None
        amax = {name: torch.tensor(values) for name, values in self.amax[_name(part)].items()}
        return CalibratedQuantizer(format, {}, amax=amax)


def check_after_training(recipe: Recipe) -> None:
    """Rejects recipes that only make sense in training.

    Raises:
        ValueError: no forward product is quantised, or its operands are rotated.
    """
    if not recipe.forward:
        raise ValueError("precision.forward must be true for a trained model, which has no other products, got false")
    if "forward" in recipe.hadamard:
        raise ValueError("precision.hadamard must not name forward for a trained model, got 'forward'")
    if "x" in recipe.stochastic:
        raise ValueError("precision.stochastic must be w for a trained model, got 'x'")


def formats_of_components(model: LanguageModel, recipe: Recipe) -> dict[Component, FormatName]:
    """Returns the format of every ledger component with weights.

    Raises:
        ValueError: the recipe does not fit the model.
    """
    rows = in_formats(model.config.ledger(1), recipe)
    return {
        Component(row.layer, row.letter, row.entry.component): row.entry.weight
        for row in rows
        if row.entry.params and row.entry.weight is not None
    }


@torch.inference_mode()
def calibrate(
    model: LanguageModel, text: Iterable[tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]]
) -> dict[str, dict[str, list[float]]]:
    """Returns the largest input magnitude of every product over some text, measured on the trained model.

    An expert that received no tokens gets the maximum over all experts.

    Args:
        text: pairs of tokens and next tokens.
    """
    parts = list(quantizable_parts(model))
    observers = [Observer("fp32", {}) for _ in parts]
    before = [part.module.quantizer for part in parts]
    for part, observer in zip(parts, observers, strict=True):
        part.module.quantizer = observer
    try:
        for tokens, targets in text:
            model.loss(tokens, targets, mtp=True)
    finally:
        for part, quantizer in zip(parts, before, strict=True):
            part.module.quantizer = quantizer
    return {
        _name(part): {name: torch.where(amax > 0, amax, amax.max()).tolist() for name, amax in observer.amax.items()}
        for part, observer in zip(parts, observers, strict=True)
    }


def _name(part: QuantizablePart) -> str:
    return part.name if part.layer is None else f"layers.{part.layer}.{part.name}"
