"""Training with Lightning: `fit` makes a run folder of an experiment."""

from explore.train.fitting import cost_record, fit, load_model
from explore.train.module import DataModule, LitLanguageModel, NonFiniteLossError
from explore.train.optimizer import JointOptimizer, build_optimizer
from explore.train.schedule import wsd

__all__ = [
    "DataModule",
    "JointOptimizer",
    "LitLanguageModel",
    "NonFiniteLossError",
    "build_optimizer",
    "cost_record",
    "fit",
    "load_model",
    "wsd",
]
