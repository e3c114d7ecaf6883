"""Quantising a trained run: sensitivities, choice of formats under a bit budget, and the child's record."""

from explore.quantizing.child import quantize_run
from explore.quantizing.choosing import Choice, choose
from explore.quantizing.recurrence import rounding_errors
from explore.quantizing.request import Quantization
from explore.quantizing.scoring import Comparison, Reference

__all__ = ["Choice", "Comparison", "Quantization", "Reference", "choose", "quantize_run", "rounding_errors"]
