"""Optuna's samplers that learn from earlier trials, extended to draw whole patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.samplers.nsgaii._crossover import _select_parent
from optuna.study._multi_objective import _dominates
from optuna.trial import FrozenTrial, TrialState

from explore.pattern import distance
from explore.search.indexed import PlannedSampler
from explore.search.spaces import NO_LAYER, PatternSpace

STARTUP = 10
"""Random trials before the sampler fits a model."""
POPULATION = 16
"""Trials per generation of NSGA-II and NSGA-III; small, because sweeps have tens of trials, not thousands."""
CROSSOVER_PROB = 0.9
"""Crossover probability, as in Optuna."""
CANDIDATES = 24
"""Candidate patterns per draw of TPE, as in Optuna."""

_distance = lru_cache(maxsize=100_000)(distance)


def pruned_in_a_row(trials: Sequence[FrozenTrial]) -> int:
    """Number of consecutive pruned trials at the end of the ended trials."""
    ended = [trial.state for trial in trials if trial.state.is_finished()]
    return next((n for n, state in enumerate(reversed(ended)) if state != TrialState.PRUNED), len(ended))


def is_letter(name: str, distribution: BaseDistribution) -> bool:
    """Whether a parameter is a layer position of a pattern."""
    is_choice = isinstance(distribution, CategoricalDistribution) and distribution.choices[-1] == NO_LAYER
    return is_choice and name.rpartition("_")[2].isdigit()


class WithoutLetters(PlannedSampler):
    """Excludes letters from the sampler's joint draw; they are drawn with their pattern."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        found = super().infer_relative_search_space(study, trial)  # type: ignore[safe-super] # Optuna's sampler is next
        return {name: distribution for name, distribution in found.items() if not is_letter(name, distribution)}


class PatternTPESampler(WithoutLetters, TPESampler):
    """Optuna's TPE; patterns are drawn by a separate step that uses the edit distance.

    As in TPE, earlier trials are split into good and bad, each side gives a density over patterns, and the candidate
    with the highest ratio of good to bad density is chosen. A density is the mean of kernels exp(-distance) around its
    patterns and one uniform kernel, each relative to uniform. Candidates are good patterns after zero or more
    mutations, and uniform draws.
    """

    def __init__(self, seed: int, rng: np.random.Generator) -> None:
        super().__init__(seed=seed, n_startup_trials=STARTUP)
        self._pattern_rng = rng

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        study, rng = trial.study, self._pattern_rng
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [other for other in study.get_trials(deepcopy=False, states=states) if other.number != trial.number]
        n_ended = sum(other.state != TrialState.RUNNING for other in trials)
        if n_ended < STARTUP:
            return space.draw(rng)
        gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
        good, bad = (_patterns(side, space, name) for side in _split_trials(study, trials, gamma(n_ended)))
        if not good:
            return space.draw(rng)
        uniform = [space.draw(rng) for _ in range(CANDIDATES)]
        candidates = uniform[: CANDIDATES // (len(good) + 1)]  # the share of the uniform part of the good's density
        while len(candidates) < CANDIDATES:
            candidate = good[rng.integers(len(good))]
            for _ in range(rng.geometric(0.5) - 1):
                candidate = space.mutate(candidate, rng)
            candidates.append(candidate)
        # The mean of a kernel over uniform patterns, which makes densities relative to uniform.
        level = float(np.mean([math.exp(-_distance(a, b)) for a in uniform for b in good + bad]))
        ratios = [_density(it, good, level) / _density(it, bad, level) for it in candidates]
        return candidates[int(np.argmax(ratios))]


def _density(pattern: str, centres: Sequence[str], level: float) -> float:
    kernels = sum(math.exp(-_distance(pattern, centre)) for centre in centres)
    return (kernels / level + 1) / (len(centres) + 1)


def _patterns(trials: Sequence[FrozenTrial], space: PatternSpace, name: str) -> list[str]:
    found = (space.read(trial.params, name) for trial in trials)
    return [pattern for pattern in found if pattern is not None]


class _Genetic(WithoutLetters):
    """Uses the same two parents for all of a child: crossover and mutation for its pattern, Optuna's for the rest."""

    _pattern_rng: np.random.Generator

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        assert isinstance(self, NSGAIISampler | NSGAIIISampler)
        population = self.get_parent_population(study, self.get_trial_generation(study, trial))
        if len(population) < 2:
            return {}
        parents: list[FrozenTrial] = []
        for _ in range(2):
            others = [other for other in population if other not in parents]
            parents.append(_select_parent(study, others, self._rng.rng, _dominates))
        self.__dict__.setdefault("_parents", {})[trial.number] = parents
        return dict(self._child_generation_strategy(study, search_space, parents)) if search_space else {}

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        rng = self._pattern_rng
        assert trial.relative_params is not None  # reading it chooses the parents
        parents = _patterns(self.__dict__.get("_parents", {}).get(trial.number, []), space, name)
        if len(parents) < 2:
            return space.draw(rng)
        pattern = (
            space.crossover(parents[0], parents[1], rng) if rng.random() < CROSSOVER_PROB else parents[rng.integers(2)]
        )
        return space.mutate(pattern, rng) if rng.random() < 0.5 else pattern


class PatternNSGAIISampler(_Genetic, NSGAIISampler):
    """Optuna's NSGA-II, with crossover and mutation of whole patterns."""

    def __init__(self, seed: int, rng: np.random.Generator) -> None:
        super().__init__(seed=seed, population_size=POPULATION, crossover_prob=CROSSOVER_PROB)
        self._pattern_rng = rng


class PatternNSGAIIISampler(_Genetic, NSGAIIISampler):
    """Optuna's NSGA-III, with crossover and mutation of whole patterns."""

    def __init__(self, seed: int, rng: np.random.Generator) -> None:
        super().__init__(seed=seed, population_size=POPULATION, crossover_prob=CROSSOVER_PROB)
        self._pattern_rng = rng


class PatternGPSampler(PlannedSampler, GPSampler):
    """Optuna's Gaussian process, for one or more objectives; its letters are mapped to the nearest pattern.

    The process ignores pruned trials and would ask for the same pattern again, so the pattern is mutated once for each
    trial pruned since the last unpruned one.
    """

    def __init__(self, seed: int, rng: np.random.Generator) -> None:
        super().__init__(seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False)
        self._pattern_rng = rng
        self._asked: dict[int, dict[str, Any]] = {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params = super().sample_relative(study, trial, search_space)
        letters = {name: value for name, value in params.items() if is_letter(name, search_space[name])}
        self._asked[trial.number] = letters
        return {name: value for name, value in params.items() if name not in letters}

    def draw_pattern(self, trial: optuna.Trial, space: PatternSpace, name: str) -> str:
        assert trial.relative_params is not None  # reading it draws the letters
        pattern = space.read(self._asked[trial.number], name)
        if pattern is None:
            return space.draw(self._pattern_rng)
        for _ in range(pruned_in_a_row(trial.study.get_trials(deepcopy=False))):
            pattern = space.mutate(pattern, self._pattern_rng)
        return pattern
