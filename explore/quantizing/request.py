"""A quantisation request: a recipe, or a bit budget under which formats are chosen."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from explore.config import Config
from explore.experiment import NUMERICS_VERSION
from explore.model.post_training import weight_operand
from explore.ops import Scales
from explore.precision import FORMATS as FORMAT_TABLE
from explore.precision import HIGH, UNQUANTIZED, Recipe, WeightFormat

FORMATS: tuple[WeightFormat, ...] = ("nvfp4", "fp8")
"""Formats to choose from besides bf16, as in Nemotron 3 Super."""

WEIGHTS_VERSION = 2
"""Version of how recipes apply to weights. It is part of a child's key only where it matters."""


class Quantization(Config):
    """Settings for quantising a trained run.

    Attributes:
        recipe: formats of components and of decoding state. With `bits`, its rules are chosen.
        bits: budget in bits per parameter, scales included.
        formats: formats to choose from besides bf16; used only with `bits`.
        scales: criterion for the scales of weights.
        calibration_tokens: training tokens for activation scales and sensitivities.
        calibration_seed: seed that selects these windows of the training split.
        seed: seed of stochastic rounding.
    """

    recipe: Recipe
    bits: PositiveFloat | None = None
    formats: tuple[WeightFormat, ...] = FORMATS
    scales: Scales = "max"
    calibration_tokens: PositiveInt = 8192
    calibration_seed: NonNegativeInt = 0
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> Quantization:
        wide = [each for each in self.formats if each in UNQUANTIZED]
        if self.bits is not None and (wide or not self.formats):
            raise ValueError(
                f"formats must be narrower than bf16, at least one of them, got {', '.join(self.formats) or 'none'}"
            )
        if self.bits is not None and self.recipe.format not in UNQUANTIZED:
            wide_formats = ", ".join(sorted(UNQUANTIZED))
            raise ValueError(f"recipe.format must be one of {wide_formats} with bits, got {self.recipe.format!r}")
        if self.scales == "four_over_six" and "nvfp4" not in self._formats:
            given = ", ".join(dict.fromkeys(self._formats))
            raise ValueError(f"scales must be max or mse if no format is nvfp4, got 'four_over_six' with {given}")
        if self.scales != "four_over_six" and "w" in self.recipe.four_over_six:
            raise ValueError(f"scales must be four_over_six if precision.four_over_six names w, got {self.scales!r}")
        return self

    @property
    def _formats(self) -> tuple[WeightFormat, ...]:
        """Formats that weights may have."""
        if self.bits is not None:
            return ("bf16", *self.formats)
        return (self.recipe.format, self.recipe.high, *(rule.format for rule in self.recipe.rules))

    def key(self, parent_key: str, digest: str) -> str:
        """Hash (64 hexadecimal digits) of everything that affects the child.

        Args:
            parent_key: key of the parent run.
            digest: digest of its weights.
        """
        content = {"parent": parent_key, "digest": digest, "quantization": self.fingerprint()}
        return _hash(content | ({"weights": WEIGHTS_VERSION} if self._differs_from_version_1 else {}))

    def sensitivity_key(self, digest: str) -> str:
        """Hash of everything that affects the sensitivities.

        Other components keep their trained weights, so `recipe.high` affects none. Formats in square blocks are part of
        the key only if there are any, so the keys of other requests are those of earlier versions.
        """
        fields = ("scales", "calibration_tokens", "calibration_seed")
        square = sorted(format for format in set(self.formats) if weight_operand(self.recipe, format).square)
        content = {"digest": digest, **{field: getattr(self, field) for field in fields}}
        return _hash(content | ({"square": square} if square else {}))

    @property
    def _differs_from_version_1(self) -> bool:
        """Whether the child's weights are not those of version 1.

        Version 1 applied `square_weights` and `stochastic` to all formats, and no rule to weights outside linear
        layers.
        """
        recipe = self.recipe
        for format in self._formats:
            how, has_blocks = weight_operand(recipe, format), FORMAT_TABLE[format].block > 0
            if (how.square, how.stochastic) != (recipe.square_weights and has_blocks, "w" in recipe.stochastic):
                return True
        return self.bits is None and any(
            rule.format in UNQUANTIZED and rule.format != recipe.high and not HIGH.issuperset(rule.components)
            for rule in recipe.rules
        )

    def fingerprint(self) -> dict[str, Any]:
        content = super().fingerprint()
        return content if self.bits is not None else content | {"formats": []}


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content | {"numerics": NUMERICS_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
