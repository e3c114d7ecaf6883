"""The model: as a config with its cost, and as a module."""

from explore.model.config import ModelConfig, MTPConfig, check_overrides
from explore.model.generation import GREEDY, Sampling, Speculation, generate, speculate
from explore.model.language_model import LanguageModel, Loss, TeacherOutput
from explore.model.layer import Layer
from explore.model.low_precision import QuantizablePart, quantizable_parts, quantize_products
from explore.model.mtp import MTPDepth
from explore.model.saved import SavedRow, saved_bytes_of, saved_rows, saved_table

__all__ = [
    "GREEDY",
    "LanguageModel",
    "Layer",
    "Loss",
    "MTPConfig",
    "MTPDepth",
    "ModelConfig",
    "QuantizablePart",
    "Sampling",
    "SavedRow",
    "Speculation",
    "TeacherOutput",
    "check_overrides",
    "generate",
    "quantizable_parts",
    "quantize_products",
    "saved_bytes_of",
    "saved_rows",
    "saved_table",
    "speculate",
]
