"""Sweeps: Optuna searches over experiments, on disk, resumed by default."""

from explore.study.averages import Merging
from explore.study.budgets import Budgets, RejectedError
from explore.study.crew import SweepSummary, run_sweep
from explore.study.gating import run_gated
from explore.study.learning_rates import LearningRates
from explore.study.preview import Preview, preview
from explore.study.pruning import FrontPruner
from explore.study.request import check_request
from explore.study.sharing import choose_workers
from explore.study.storage import serve_storage
from explore.study.sweep_file import Sweep, load_sweep
from explore.study.worker import TrialOptions

__all__ = [
    "Budgets",
    "FrontPruner",
    "LearningRates",
    "Merging",
    "Preview",
    "RejectedError",
    "Sweep",
    "SweepSummary",
    "TrialOptions",
    "check_request",
    "choose_workers",
    "load_sweep",
    "preview",
    "run_gated",
    "run_sweep",
    "serve_storage",
]
