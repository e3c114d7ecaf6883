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
from explore.precision import UNQUANTIZED, FormatName, OperandFormat, Recipe, products_of

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
            square_weights: as in a recipe, for `put`; `apply` follows its recipe.
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
        recipe = Recipe(square_weights=self.square_weights)
        self._put(component, OperandFormat() if format is None else weight_operand(recipe, format), seed)

    def restore(self) -> None:
        """Restores all trained weights."""
        for component in self._trained:
            self.put(component, None)

    def apply(self, recipe: Recipe, seed: int = 0) -> None:
        """Quantises the whole model by a recipe, permanently.

        Weights share scales and are rounded as in training. Those outside linear layers, such as norms, have the wide
        format of a rule that names them, else the recipe's high format; so have biases. Decoding state is rounded to
        `recipe.kv` and `recipe.state`.

        Raises:
            ValueError: the recipe does not fit the model, or is for training only.
        """
        check_after_training(recipe)
        formats = formats_of_components(self.model, recipe)
        in_components = {id(weight) for component in self.components for weight, _, _ in self._weights(component)}
        for component in self.components:
            how = weight_operand(recipe, formats[component])
            self._put(component, how, seed if how.stochastic else None)
        # A ledger component may hold several parameters: "A_log, D, dt_bias".
        by_parameter = {
            component._replace(name=name.replace(" ", "_")): format
            for component, format in formats.items()
            for name in component.name.split(", ")
        }
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in in_components:
                format = by_parameter.get(self._place(name), recipe.high)
                parameter.data.copy_(quantize(parameter, format if format in UNQUANTIZED else recipe.high))
        self._trained.clear()
        if recipe.kv is not None or recipe.state is not None:
            self.model.state_rounding = StateRounding(
                recipe.kv,
                recipe.state,
                recipe.kv_rounding == "stochastic",
                recipe.state_rounding == "stochastic",
                seed,
            )

    def _put(self, component: Component, how: OperandFormat, seed: int | None) -> None:
        """Quantises one component; a format of None restores its trained weights."""
        weights = list(self._weights(component))
        kept = self._trained.setdefault(component, [weight.detach().clone() for weight, _, _ in weights])
        for (weight, axis, name), trained in zip(weights, kept, strict=True):
            new = trained if how.format is None else self._quantized(trained, how, axis, f"{component} {name}", seed)
            weight.data.copy_(new)
        for part in self.components[component]:
            part.module.quantizer = None if how.format is None else self._quantizer(part, how.format)

    def _place(self, parameter: str) -> Component:
        """Returns layer, letter and name of the part of the model that has a parameter."""
        match parameter.split("."):
            case ["layers", i, *path]:
                return Component(int(i), self.model.config.pattern[int(i)], _part_of(path))
            case ["mtp", _, "layers", _, *path]:
                return Component(None, MTP_LETTER, _part_of(path))
            case ["mtp", _, part, *_]:
                return Component(None, MTP_LETTER, part)
            case [part, *_]:
                return Component(None, "", part)
        raise AssertionError(parameter)

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

    def _quantized(self, weight: Tensor, how: OperandFormat, axis: int, name: str, seed: int | None) -> Tensor:
        assert how.format is not None
        generator = None if seed is None else rounding_generator(seed, 0, name, "w", weight.device)
        return quantize_weight(
            weight,
            how.format,
            self.scales,
            block_axis=axis,
            square=how.square,
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
        ValueError: no forward product is quantised, or a field has no effect on a trained model.
    """
    if not recipe.forward:
        raise ValueError("precision.forward must be true for a trained model, which has no other products, got false")
    if "forward" in recipe.hadamard:
        raise ValueError("precision.hadamard must not name forward for a trained model, got 'forward'")
    if "x" in recipe.stochastic:
        raise ValueError("precision.stochastic must be w for a trained model, got 'x'")
    if "x" in recipe.four_over_six:
        raise ValueError("precision.four_over_six must be w for a trained model, got 'x'")
    if "w" in recipe.stochastic and recipe.scale_rounding != "nearest":
        raise ValueError(
            "precision.scale_rounding must be nearest for a trained model whose weights round stochastically, "
            f"got {recipe.scale_rounding!r}"
        )
    if recipe.since:
        raise ValueError(f"precision.since must be 0 for a trained model, got {recipe.since:g}")
    for name, share in recipe.until:
        if share != 1:
            raise ValueError(f"precision.until.{name} must be 1 for a trained model, got {share:g}")


def weight_operand(recipe: Recipe, format: FormatName) -> OperandFormat:
    """Returns how weights in a format are quantised: as in the forward products of training."""
    return products_of(recipe, format)["forward"][1]


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


def _part_of(path: list[str]) -> str:
    """Returns the part that has a layer's parameter, such as `conv1d`; the norm before the mixer is `input_norm`."""
    return "input_norm" if path[0] == "norm" else path[min(1, len(path) - 1)]


def _name(part: QuantizablePart) -> str:
    return part.name if part.layer is None else f"layers.{part.layer}.{part.name}"
