"""The model as a config with its cost, and as a module."""

from explore.model.config import ModelConfig, MTPConfig, check_overrides
from explore.model.generation import GREEDY, Sampling, Speculation, generate, speculate
from explore.model.language_model import LanguageModel, Loss, TeacherOutput
from explore.model.layer import Layer
from explore.model.low_precision import QuantizablePart, quantizable_parts, quantize_products
from explore.model.mtp import MTPDepth
from explore.model.post_training import (
    Amax,
    Component,
    QuantizedModel,
    calibrate,
    check_after_training,
    formats_of_components,
)
from explore.model.saved import SavedRow, saved_bytes_of, saved_rows, saved_table

__all__ = [
    "GREEDY",
    "Amax",
    "Component",
    "LanguageModel",
    "Layer",
    "Loss",
    "MTPConfig",
    "MTPDepth",
    "ModelConfig",
    "QuantizablePart",
    "QuantizedModel",
    "Sampling",
    "SavedRow",
    "Speculation",
    "TeacherOutput",
    "calibrate",
    "check_after_training",
    "check_overrides",
    "formats_of_components",
    "generate",
    "quantizable_parts",
    "quantize_products",
    "saved_bytes_of",
    "saved_rows",
    "saved_table",
    "speculate",
]
