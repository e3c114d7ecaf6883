"""The samplers of sweeps by name. What each trial gets follows from the seed and the trial's index alone."""

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
"""Samplers that look at no other trial."""
SAMPLERS = (*INDEXED, *_INFORMED)
"""All names, from the simplest on."""
DEFAULT_SAMPLER = "tpe"
STUCK = 10
"""Pruned trials in a row after which a sampler that learns lets one trial be drawn at random."""


def make_sampler(name: str, seed: int, draw: int, *, grid: Grid | None = None) -> BaseSampler:
    """A sampler for one trial.

    `random`, `qmc` and `grid` look at no other trial: what theirs gets is a function of the seed, the draw and the
    parameters in the order in which they are suggested. The others learn from the trials that there are, with
    random numbers that follow from the seed and the draw.

    Args:
        draw: index of the trial among those that are drawn.
        grid: for `grid`, the values of every parameter; of a pattern, its patterns or their space.

    Raises:
        ValueError: an unknown name, a grid that is missing, or a library that is.
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
    """Refuses a name that no sampler has.

    Raises:
        ValueError: with the names that are allowed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")


class DrawnSampler(BaseSampler):
    """The sampler of a study: a fresh one of the given name for every trial.

    The draw of a trial is the number of trials before it that were not enqueued, so neither baselines nor retries
    move the others; a retry has the draw of the trial whose number its attribute `draw` names.
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
        """Draws the pattern called `name` of a trial; the letters are what the trial is suggested next."""
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
