"""Training with Lightning: `fit` trains an experiment into a run folder."""

from explore.archive import read_weights
from explore.checkpoints import load_model
from explore.train.blockwise import block_library
from explore.train.capacity import check_capacity
from explore.train.child import child_experiment
from explore.train.environment import multiplies_bf16, processor, slow_precision
from explore.train.fitting import BusyError, fit
from explore.train.halves import in_halves
from explore.train.judging import Judge
from explore.train.loaded import LoadedRun, load
from explore.train.low_precision import product_paths
from explore.train.memory import keep_freed_memory
from explore.train.merging import decay_weights, merge_weights, merge_window, score_merge
from explore.train.models import document_scores, evaluate, score
from explore.train.module import DataModule, DivergedError, LitLanguageModel
from explore.train.objectives import build_objective
from explore.train.optimizer import JointOptimizer, build_optimizer
from explore.train.parallel import is_writer
from explore.train.puzzle_rounds import puzzle_rounds
from explore.train.record import cost_record
from explore.train.regions import COMPILED, QUANTIZE, compiled_ops, keep_compiled, own_table
from explore.train.schedule import stable_steps, wsd

__all__ = [
    "COMPILED",
    "QUANTIZE",
    "BusyError",
    "DataModule",
    "DivergedError",
    "JointOptimizer",
    "Judge",
    "LitLanguageModel",
    "LoadedRun",
    "block_library",
    "build_objective",
    "build_optimizer",
    "check_capacity",
    "child_experiment",
    "compiled_ops",
    "cost_record",
    "decay_weights",
    "document_scores",
    "evaluate",
    "fit",
    "in_halves",
    "is_writer",
    "keep_compiled",
    "keep_freed_memory",
    "load",
    "load_model",
    "merge_weights",
    "merge_window",
    "multiplies_bf16",
    "own_table",
    "processor",
    "product_paths",
    "puzzle_rounds",
    "read_weights",
    "score",
    "score_merge",
    "slow_precision",
    "stable_steps",
    "wsd",
]
