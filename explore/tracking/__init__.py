"""What Weights & Biases is told: the experiment of a run, a sweep with its frontier, and the pages that show them."""

from explore.tracking.mirror import PROJECT, WandbMode, log_sweep, run_id, send_config, send_summary
from explore.tracking.pages import Pages

__all__ = ["PROJECT", "Pages", "WandbMode", "log_sweep", "run_id", "send_config", "send_summary"]
