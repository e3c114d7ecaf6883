"""A quantisation request: a recipe, or a bit budget under which formats are chosen."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from explore.config import Config
from explore.experiment import NUMERICS_VERSION
from explore.ops import Scales
from explore.precision import UNQUANTIZED, Recipe, WeightFormat

FORMATS: tuple[WeightFormat, ...] = ("nvfp4", "fp8")
"""Formats to choose from besides bf16, as in Nemotron 3 Super."""


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
        return self

    def key(self, parent_key: str, digest: str) -> str:
        """Hash (64 hexadecimal digits) of everything that affects the child.

        Args:
            parent_key: key of the parent run.
            digest: digest of its weights.
        """
        return _hash({"parent": parent_key, "digest": digest, "quantization": self.fingerprint()})

    def sensitivity_key(self, digest: str) -> str:
        """Hash of everything that affects the sensitivities."""
        fields = ("scales", "calibration_tokens", "calibration_seed")
        return _hash({"digest": digest, **{field: getattr(self, field) for field in fields}})

    def fingerprint(self) -> dict[str, Any]:
        content = super().fingerprint()
        return content if self.bits is not None else content | {"formats": []}


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content | {"numerics": NUMERICS_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
