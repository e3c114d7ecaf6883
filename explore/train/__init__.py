"""Training with Lightning: `fit` makes a run folder of an experiment."""

from explore.train.fitting import cost_record, evaluate, fit, load_model, read_weights
from explore.train.merging import decay_weights, merge_run, merge_weights, merge_window, score_merge
from explore.train.module import DataModule, LitLanguageModel, NonFiniteLossError
from explore.train.optimizer import JointOptimizer, build_optimizer
from explore.train.parallel import is_writer
from explore.train.schedule import stable_steps, wsd

__all__ = [
    "DataModule",
    "JointOptimizer",
    "LitLanguageModel",
    "NonFiniteLossError",
    "build_optimizer",
    "cost_record",
    "decay_weights",
    "evaluate",
    "fit",
    "is_writer",
    "load_model",
    "merge_run",
    "merge_weights",
    "merge_window",
    "read_weights",
    "score_merge",
    "stable_steps",
    "wsd",
]
