"""Inference bounds: hardware, a model's limits on it, and published speed-ups."""

from explore.roofline.costs import costs_table
from explore.roofline.hardware import GPUS, HERE, Hardware, hardware, measured
from explore.roofline.published import SPEEDUPS, facts, speedup_table
from explore.roofline.regimes import (
    Deployment,
    all_to_all_ratio,
    decode_table,
    expert_intensity,
    tokens_at_ridge,
)

__all__ = [
    "GPUS",
    "HERE",
    "SPEEDUPS",
    "Deployment",
    "Hardware",
    "all_to_all_ratio",
    "costs_table",
    "decode_table",
    "expert_intensity",
    "facts",
    "hardware",
    "measured",
    "speedup_table",
    "tokens_at_ridge",
]
