"""Precision recipes: the format of each component's products, and the rounding of operands."""

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
"""Matrix components that stay in high precision unless a rule names them."""


class Place(NamedTuple):
    """The position of a component in a model.

    Attributes:
        layer: index from 0; None for embedding, head and multi-token prediction.
        n_layers: number of layers of the model.
        letter: as in the ledger: a pattern letter, empty outside the layers, `/` for multi-token prediction.
        component: name in the ledger.
        quantizable: whether it is a matrix of a linear layer.
        next_letter: letter of the next layer; empty for the last one and outside the layers.
    """

    layer: int | None
    n_layers: int
    letter: str
    component: str
    quantizable: bool
    next_letter: str = ""


class _Brief(Config):
    """A config whose JSON holds only fields that differ from their defaults."""

    @model_serializer(mode="wrap")
    def _differences(self, whole: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        content = whole(self)
        fields = type(self).model_fields
        return {name: part for name, part in content.items() if getattr(self, name) != fields[name].default}


class Rule(_Brief):
    """Assigns a format to components that meet all given conditions.

    Attributes:
        layers: layer indices; negative ones count from the end.
        first: fraction of the layers, from the first on.
        last: fraction of the layers, up to the last. A layer need only be in one of `layers`, `first` and `last`.
        letters: pattern letters; `/` is multi-token prediction.
        before: pattern letters of the next layer: `"letters": "M", "before": "*"` is every M directly before a *.
        components: ledger components. A rule applies to embedding, head, router, norms and convolutions
            only if it names them.
        optional: the rule, or a part of it, may match nothing in a model.
    """

    format: WeightFormat
    layers: tuple[int, ...] = ()
    first: float = Field(default=0, ge=0, le=1)
    last: float = Field(default=0, ge=0, le=1)
    letters: str = ""
    before: str = ""
    components: tuple[str, ...] = ()
    optional: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if not (self._places_layers or self.letters or self.before or self.components):
            raise ValueError(
                "layers, first, last, letters, before or components must be given: a rule needs a condition"
            )
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
        if self.before and (not place.next_letter or place.next_letter not in self.before):
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
    """Fractions of the schedule after which products return to bf16.

    Attributes:
        forward: fraction for forward products.
        backward: fraction for the products of both gradients.
    """

    forward: float = Field(default=1, ge=0, le=1)
    backward: float = Field(default=1, ge=0, le=1)


class Recipe(_Brief):
    """Formats of a model's products and quantisation of their operands.

    JSON may name a recipe as `base` and give only the fields that differ. `stochastic`, `hadamard` and
    `square_weights` apply to components in `format` and in 4-bit formats; components that a rule puts in
    wider formats round to nearest.

    Attributes:
        format: format of linear layers, experts and latent projections that no rule matches.
        rules: rules in order; the first match decides.
        forward: quantise operands of forward products; otherwise bf16.
        input_gradient: quantise operands of input-gradient products.
        weight_gradient: quantise operands of weight-gradient products.
        stochastic: operands rounded stochastically; others round to nearest.
        hadamard: products whose operands are rotated before quantisation.
        hadamard_size: block size of the rotation, in elements.
        square_weights: share one weight scale per square block, so forward and backward use the same values.
        four_over_six: operands whose NVFP4 blocks use the better of two scales.
        scale_rounding: rounding of E4M3 scales of stochastically rounded operands; `up` avoids saturation, which
            keeps gradients unbiased.
        since: fraction of the schedule before which the run is one in bf16, or in fp32 if that is the format. Runs that
            differ after it alone share a trunk.
        until: fractions of the schedule after which products return to bf16; one number sets both.
        kv: format of keys and values in decoding; None is bf16.
        state: format of recurrent and convolution state in decoding; None is fp32.
        kv_rounding: rounding of keys and values.
        state_rounding: rounding of state. A recurrence accumulates the rounding error of every token unless its
            mean is zero, as with `stochastic`.
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
    since: float = Field(default=0, ge=0, lt=1)
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

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not (self.forward or self.input_gradient or self.weight_gradient):
            raise ValueError("forward: must be true if input_gradient and weight_gradient are false, got false")
        for field in ("stochastic", "hadamard", "four_over_six"):
            given: tuple[str, ...] = getattr(self, field)
            if len(set(given)) < len(given):
                raise ValueError(f"{field}: must not contain a value twice, got {', '.join(given)}")
        last = min(self.until.forward, self.until.backward)
        if self.since and self.since >= last:
            raise ValueError(f"since: must be below until, {last:g}, got {self.since:g}")
        return self

    @property
    def high(self) -> WeightFormat:
        """Format of everything not quantised."""
        return self.format if self.format in UNQUANTIZED else "bf16"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Published warnings about this recipe."""
        names = {"w": "weights", "x": "activations"}
        return tuple(
            f"stochastic rounding of {names[operand]} diverges in published runs (arXiv 2509.25149); use it for dy"
            for operand in self.stochastic
            if operand in names
        )

    def format_of(self, place: Place) -> WeightFormat:
        """Format of a component's weights and of the operands of its products."""
        for rule in self.rules:
            if rule.matches(place):
                return rule.format
        return self.format if place.quantizable and place.component not in HIGH else self.high
