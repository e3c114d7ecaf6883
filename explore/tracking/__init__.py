"""Mirrors to Weights & Biases: the config and summary of runs, sweeps with their frontier, and pages that show them."""

from explore.tracking.mirror import PROJECT, WandbMode, log_sweep, run_id, send_config, send_summary
from explore.tracking.pages import Pages

__all__ = ["PROJECT", "Pages", "WandbMode", "log_sweep", "run_id", "send_config", "send_summary"]
