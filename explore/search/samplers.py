"""The samplers of sweeps, by name. A sampler's randomness depends only on the seed and the trial's index."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from explore.search.indexed import ExhaustedError, Grid, GridSampler, IndexedSampler, random_point, sobol_point
from explore.search.informed import (
    PatternGPSampler,
    PatternNSGAIIISampler,
    PatternNSGAIISampler,
    PatternTPESampler,
    pruned_in_a_row,
)
from explore.search.spaces import PatternSampler, PatternSpace

__all__ = ["DEFAULT_SAMPLER", "INDEXED", "SAMPLERS", "DrawnSampler", "ExhaustedError", "Grid", "make_sampler"]

_POINTS: dict[str, Callable[[int, int], Sequence[float]]] = {"random": random_point, "qmc": sobol_point}
_INFORMED: dict[str, Callable[[int, np.random.Generator], BaseSampler]] = {
    "tpe": PatternTPESampler,
    "nsga2": PatternNSGAIISampler,
    "nsga3": PatternNSGAIIISampler,
    "gp": PatternGPSampler,
}
INDEXED = (*_POINTS, "grid")
"""Samplers that ignore other trials."""
SAMPLERS = (*INDEXED, *_INFORMED)
"""All names, simplest first."""
DEFAULT_SAMPLER = "tpe"
STUCK = 10
"""Consecutive pruned trials after which a learning sampler draws one trial at random."""


def make_sampler(name: str, seed: int, draw: int, *, grid: Grid | None = None) -> BaseSampler:
    """A sampler for one trial.

    `random`, `qmc` and `grid` ignore other trials: their values depend only on the seed, the draw, and the order in
    which parameters are suggested. The others learn from existing trials, with random numbers that depend on the seed
    and the draw.

    Args:
        draw: index of the trial among those drawn by the sampler.
        grid: for `grid`, the values of every parameter; for a pattern, a list of patterns or their space.

    Raises:
        ValueError: the name is unknown, or the grid or a required library is missing.
    """
    check_sampler(name)
    if name in _POINTS:
        return IndexedSampler(partial(_POINTS[name], seed, draw))
    if name == "grid":
        if not grid:
            raise ValueError("grid: the sampler 'grid' needs a mapping from every parameter to its values")
        return GridSampler(draw, grid)
    if name == "gp" and (missing := [library for library in ("scipy", "torch") if find_spec(library) is None]):
        raise ValueError(f"sampler: 'gp' needs {' and '.join(missing)}, which cannot be imported")
    own, optunas = np.random.SeedSequence([seed, draw]).spawn(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _INFORMED[name](int(optunas.generate_state(1)[0]), np.random.default_rng(own))


def check_sampler(name: str) -> None:
    """Checks the name of a sampler.

    Raises:
        ValueError: the name is unknown; the message lists the allowed names.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")


class DrawnSampler(BaseSampler):
    """The sampler of a study: a fresh one of the given name for every trial.

    The draw of a trial is the number of earlier trials that were not enqueued, so baselines and retries do not shift
    other trials; a retry uses the draw of its original trial, whose number is in its attribute `draw`.
    """

    def __init__(self, name: str, seed: int, grid: Grid | None = None) -> None:
        make_sampler(name, seed, 0, grid=grid)
        self.name, self.seed, self.grid = name, seed, grid
        self._samplers: dict[int, BaseSampler] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        trials = study.get_trials(deepcopy=False)
        origin = trial.user_attrs.get("draw", trial.number)
        draw = sum("fixed_params" not in other.system_attrs for other in trials if other.number < origin)
        name = "random" if self.name not in INDEXED and pruned_in_a_row(trials) >= STUCK else self.name
        sampler = self._samplers[trial.number] = make_sampler(name, self.seed, draw, grid=self.grid)
        sampler.before_trial(study, trial)

    def plan(self, trial: optuna.Trial, space: PatternSpace, name: str) -> None:
        """Draws the trial's pattern `name`; the trial's next suggestions return its letters."""
        sampler = self._samplers[trial.number]
        assert isinstance(sampler, PatternSampler)
        sampler.plan(trial, space, name)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._samplers[trial.number].infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._samplers[trial.number].sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._samplers[trial.number].sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        sampler = self._samplers.pop(trial.number, None)
        if sampler is not None:
            sampler.after_trial(study, trial, state, values)
