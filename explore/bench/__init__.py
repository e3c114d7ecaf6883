"""Benchmarks on this machine, compared with the alternatives that a user has."""

from explore.bench.compress import compare_compression
from explore.bench.families import SHAPES, Shape, families
from explore.bench.neighbours import time_neighbours
from explore.bench.ops import time_ops
from explore.bench.precision import compare_precisions
from explore.bench.profile import KINDS, by_op, by_part, profile_training
from explore.bench.sharing import time_sharing
from explore.bench.text import time_text
from explore.bench.training import compare, compare_curves, compare_decoding, time_regions, time_trials

__all__ = [
    "KINDS",
    "SHAPES",
    "Shape",
    "by_op",
    "by_part",
    "compare",
    "compare_compression",
    "compare_curves",
    "compare_decoding",
    "compare_precisions",
    "families",
    "profile_training",
    "time_neighbours",
    "time_ops",
    "time_regions",
    "time_sharing",
    "time_text",
    "time_trials",
]
