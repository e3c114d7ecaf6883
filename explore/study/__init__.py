"""Sweeps: Optuna searches over experiments, on disk, resumed by default."""

from explore.study.sweep_file import RejectedError, Sweep, load_sweep
from explore.study.worker import SweepSummary, run_sweep

__all__ = ["RejectedError", "Sweep", "SweepSummary", "load_sweep", "run_sweep"]
