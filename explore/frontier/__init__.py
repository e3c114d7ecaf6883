"""Frontier statistics: which runs are best at their cost, and which differences exceed the noise between seeds."""

from explore.frontier.along import paired_curves
from explore.frontier.arms import apart_from_diverged, arms_table, pairs_table, seeds_table
from explore.frontier.axes import add_axes, experiments_of, front_changes
from explore.frontier.bands import seed_bands
from explore.frontier.columns import Floats
from explore.frontier.comparisons import compare, n_for_half_width
from explore.frontier.documents import document_interval
from explore.frontier.flips import rank_correlation
from explore.frontier.front import hypervolume, pareto_front
from explore.frontier.intervals import NOT_RESOLVED, Interval, holm
from explore.frontier.laws import PowerLaws, fit_power_laws, reducible_ratio
from explore.frontier.multipliers import Crossover, EffectiveCompute, crossover, effective_compute
from explore.frontier.noise import Noise, bartlett, fit_noise
from explore.frontier.scores import cluster_interval, success_difference, success_fraction
from explore.frontier.seeds import HALF_WIDTH, seed_groups, seed_means
from explore.frontier.volumes import hypervolume_difference, hypervolume_interval

__all__ = [
    "HALF_WIDTH",
    "NOT_RESOLVED",
    "Crossover",
    "EffectiveCompute",
    "Floats",
    "Interval",
    "Noise",
    "PowerLaws",
    "add_axes",
    "apart_from_diverged",
    "arms_table",
    "bartlett",
    "cluster_interval",
    "compare",
    "crossover",
    "document_interval",
    "effective_compute",
    "experiments_of",
    "fit_noise",
    "fit_power_laws",
    "front_changes",
    "holm",
    "hypervolume",
    "hypervolume_difference",
    "hypervolume_interval",
    "n_for_half_width",
    "paired_curves",
    "pairs_table",
    "pareto_front",
    "rank_correlation",
    "reducible_ratio",
    "seed_bands",
    "seed_groups",
    "seed_means",
    "seeds_table",
    "success_difference",
    "success_fraction",
]
