"""Samplers whose draws depend only on an index, not on other trials: random, quasi-random, and grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from scipy.stats import qmc

from explore.search.spaces import PatternSpace

DIMENSIONS = 512
"""Maximum number of parameters in a trial of an indexed sampler."""

Grid = Mapping[str, Sequence[Any] | PatternSpace]
"""Values of every parameter; for a pattern, a list of patterns or their space."""


class ExhaustedError(RuntimeError):
    """All points of a grid have been drawn."""


class PlannedSampler(BaseSampler):
    """Base of samplers that draw a pattern as a whole; its letters are then the values of their parameters."""

    def plan(self, trial: optuna.Trial, space: PatternSpace, name: str) -> None:
        """Draws the trial's pattern `name`; the trial's next suggestions return its letters."""
        letters = space.params(self.draw_pattern(trial, space, name), name)
        self._planned().update({(trial.number, position): letter for position, letter in letters.items()})

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        """A pattern of the space for a trial."""
        raise NotImplementedError

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        letter = self._planned().get((trial.number, param_name))
        return letter if letter is not None else self.sample_one(study, trial, param_name, param_distribution)

    def sample_one(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """A value of a parameter that is not a letter of a planned pattern."""
        return super().sample_independent(study, trial, name, distribution)  # type: ignore[safe-super] # Optuna's sampler is next

    def _planned(self) -> dict[tuple[int, str], str]:
        planned: dict[tuple[int, str], str] = self.__dict__.setdefault("_letters", {})
        return planned


class SeparateSampler(PlannedSampler):
    """Base of samplers that draw every parameter independently."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}


class IndexedSampler(SeparateSampler):
    """Maps a point of the unit cube to parameters: the k-th suggestion of a trial takes coordinate k.

    Each letter of a pattern takes one coordinate. A trial's values depend only on the point and on the order in which
    the parameters are suggested.
    """

    def __init__(self, point: Callable[[], Sequence[float]]) -> None:
        self._point = point

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        return space.at(self._coordinates(len(trial.params), space.max_layers))

    def sample_one(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return from_unit(self._coordinates(len(trial.params), 1)[0], distribution)

    def _coordinates(self, start: int, n: int) -> Sequence[float]:
        if start + n > DIMENSIONS:
            raise ValueError(f"a trial of this sampler must have at most {DIMENSIONS} parameters, got {start + n}")
        return self._point()[start : start + n]


class GridSampler(SeparateSampler):
    """One point of a grid, the last parameter changing fastest.

    Raises:
        ExhaustedError: on the first parameter of a draw beyond the last point.
    """

    def __init__(self, draw: int, grid: Grid) -> None:
        self.grid = grid
        self._places: dict[str, int] | None = {}
        for name, values in reversed(tuple(grid.items())):
            draw, self._places[name] = divmod(draw, _count(name, values))
        if draw:
            self._places = None

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        return str(self._value(name))

    def sample_one(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        value = self._value(name)
        try:
            inside = distribution._contains(distribution.to_internal_repr(value))
        except ValueError:
            inside = False
        if not inside:
            raise ValueError(f"grid: {value!r} is not a value that {name!r} can have; it is {distribution}")
        return value

    def _value(self, name: str) -> Any:
        if name not in self.grid:
            raise ValueError(f"grid: no values for {name!r}; it has {', '.join(self.grid) or 'none at all'}")
        if self._places is None:
            points = math.prod(_count(name, values) for name, values in self.grid.items())
            raise ExhaustedError(f"all {points} points of the grid have been drawn")
        values, place = self.grid[name], self._places[name]
        return values.pattern_at(place) if isinstance(values, PatternSpace) else values[place]


def random_point(seed: int, draw: int) -> Sequence[float]:
    """A point drawn at random."""
    point: list[float] = np.random.default_rng(np.random.SeedSequence([seed, draw])).random(DIMENSIONS).tolist()
    return point


def sobol_point(seed: int, draw: int) -> Sequence[float]:
    """Point number `draw` of the scrambled Sobol sequence of a seed."""
    engine = _sobol(seed).reset()
    if draw:  # scipy cannot go forward by nothing
        engine.fast_forward(draw)
    point: list[float] = engine.random(1)[0].tolist()
    return point


@lru_cache(maxsize=64)
def _sobol(seed: int) -> qmc.Sobol:
    return qmc.Sobol(DIMENSIONS, scramble=True, rng=np.random.default_rng(np.random.SeedSequence([seed])))


def from_unit(u: float, distribution: BaseDistribution) -> Any:
    """The value at quantile `u` in [0, 1) of the uniform or log-uniform distribution over the allowed values."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(u * len(distribution.choices))]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        if distribution.log:  # each integer gets the interval that rounds to it
            return min(max(round(_geometric(u, low - 0.5, high + 0.5)), int(low)), int(high))
        return int(low) + distribution.step * int(u * ((int(high) - int(low)) // distribution.step + 1))
    if distribution.step is not None:
        place = int(u * (round((high - low) / distribution.step) + 1))
        return min(low + distribution.step * place, high)
    return min(max(_geometric(u, low, high) if distribution.log else low + u * (high - low), low), high)


def _geometric(u: float, low: float, high: float) -> float:
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


def _count(name: str, values: Sequence[Any] | PatternSpace) -> int:
    count = values.size if isinstance(values, PatternSpace) else len(values)
    if not count:
        raise ValueError(f"grid: {name!r} has no values")
    return count
