"""A recipe: which component of which layer multiplies in which format, and how operands are rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_serializer, model_validator

from explore.config import Config
from explore.number_formats import UNQUANTIZED

WeightFormat = Literal["fp32", "bf16", "fp16", "fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4"]
StateFormat = Literal["fp32", "bf16", "fp16", "fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4", "int8"]
Rounding = Literal["nearest", "stochastic"]
Operand = Literal["x", "w", "dy"]
Product = Literal["forward", "input_gradient", "weight_gradient"]

HIGH = frozenset({"embedding", "head", "router", "shared_gate"})
"""Components with matrices that stay high unless a rule names them."""


class Place(NamedTuple):
    """Where a component stands in a model.

    Attributes:
        layer: counts from 0; None for embedding, head and multi-token prediction.
        n_layers: layers of the model.
        letter: as in the ledger: of the pattern, empty outside the layers, `/` for multi-token prediction.
        component: name in the ledger.
        quantizable: it is a matrix of a linear layer.
    """

    layer: int | None
    n_layers: int
    letter: str
    component: str
    quantizable: bool


class _Brief(Config):
    """A config whose JSON has what differs from the defaults."""

    @model_serializer(mode="wrap")
    def _differences(self, whole: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        content = whole(self)
        fields = type(self).model_fields
        return {name: part for name, part in content.items() if getattr(self, name) != fields[name].default}


class Rule(_Brief):
    """A format for the components that meet all conditions that are given.

    Attributes:
        layers: indices of layers; negative ones count from the end.
        first: share of the layers, from the first on.
        last: share of the layers, up to the last. A layer in any of `layers`, `first` and `last` meets the condition.
        letters: letters of the pattern, any of them; `/` is multi-token prediction.
        components: names of components in the ledger, any of them. Embedding, head, router, norms and convolutions
            are in a rule only where it names them.
        optional: the rule may match nothing in a model.
    """

    format: WeightFormat
    layers: tuple[int, ...] = ()
    first: float = Field(default=0, ge=0, le=1)
    last: float = Field(default=0, ge=0, le=1)
    letters: str = ""
    components: tuple[str, ...] = ()
    optional: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if not (self._places_layers or self.letters or self.components):
            raise ValueError("layers, first, last, letters or components must be given: a rule needs a condition")
        return self

    @property
    def _places_layers(self) -> bool:
        return bool(self.layers or self.first or self.last)

    def matches(self, place: Place) -> bool:
        """Whether a component meets the conditions."""
        if self._places_layers and not self._has_layer(place):
            return False
        if self.letters and (not place.letter or place.letter not in self.letters):
            return False
        if self.components:
            return place.component in self.components
        return place.quantizable and place.component not in HIGH

    def _has_layer(self, place: Place) -> bool:
        n, layer = place.n_layers, place.layer
        if layer is None:
            return False
        return (
            layer in self.layers
            or layer - n in self.layers
            or layer < round(self.first * n)
            or layer >= n - round(self.last * n)
        )


class Until(_Brief):
    """Shares of the schedule after which products return to bf16.

    Attributes:
        forward: of forward products.
        backward: of the products of both gradients.
    """

    forward: float = Field(default=1, ge=0, le=1)
    backward: float = Field(default=1, ge=0, le=1)


class Recipe(_Brief):
    """Formats of a model's products, and how their operands are quantised.

    JSON may name a recipe as `base` and give the fields in which it differs. `stochastic`, `hadamard` and
    `square_weights` act on components in `format` and on those in formats of 4 bits; components that a rule has in
    wider formats are rounded to nearest.

    Attributes:
        format: of linear layers, experts and latent projections that no rule matches.
        rules: in order; the first that matches a component decides.
        forward: forward products of the components above take quantised operands; else bf16.
        input_gradient: products that give the gradient of the input do.
        weight_gradient: products that give the gradient of the weight do.
        stochastic: operands that are rounded stochastically; others to nearest.
        hadamard: products whose operands are rotated before they are quantised.
        hadamard_size: elements of a block that is rotated.
        square_weights: scales of weights are for squares, so that forward and backward pass see the same values.
        four_over_six: operands whose blocks take the better of two scales, where they are in NVFP4.
        scale_rounding: rounding of E4M3 scales of operands that are rounded stochastically; with `up` no element
            saturates, and the mean of a gradient is right.
        until: shares of the schedule after which products return to bf16; a number stands for both.
        kv: format of keys and values in decoding; bf16 when absent.
        state: format of recurrent and convolution state in decoding; fp32 when absent.
        kv_rounding: rounding of keys and values.
        state_rounding: rounding of state. A recurrence adds up what its state is rounded by at every token, unless the
            mean of that is zero, as with `stochastic`.
    """

    format: WeightFormat = "bf16"
    rules: tuple[Rule, ...] = ()
    forward: bool = True
    input_gradient: bool = True
    weight_gradient: bool = True
    stochastic: tuple[Operand, ...] = ()
    hadamard: tuple[Product, ...] = ()
    hadamard_size: Literal[4, 16, 128] = 16
    square_weights: bool = False
    four_over_six: tuple[Operand, ...] = ()
    scale_rounding: Literal["nearest", "up"] = "nearest"
    until: Until = Until()
    kv: StateFormat | None = None
    state: StateFormat | None = None
    kv_rounding: Rounding = "nearest"
    state_rounding: Rounding = "nearest"

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if isinstance(share := data.get("until"), int | float) and not isinstance(share, bool):
            data["until"] = {"forward": share, "backward": share}
        if "base" in data:
            from explore.precision.named import named

            data = {**named(data.pop("base"), "base").model_dump(), **data}
        return data

    @property
    def high(self) -> WeightFormat:
        """Format of everything that is not quantised."""
        return self.format if self.format in UNQUANTIZED else "bf16"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What print says against this recipe."""
        names = {"w": "weights", "x": "activations"}
        return tuple(
            f"stochastic rounding of {names[operand]} diverges in print (arXiv 2509.25149); gradients (dy) gain from it"
            for operand in self.stochastic
            if operand in names
        )

    def format_of(self, place: Place) -> WeightFormat:
        """Format of a component's weights and of the operands of its products."""
        for rule in self.rules:
            if rule.matches(place):
                return rule.format
        return self.format if place.quantizable and place.component not in HIGH else self.high
