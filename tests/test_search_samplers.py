"""Samplers: a draw follows from seed and index alone, and patterns are drawn as a whole."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import GPSampler
from optuna.trial import TrialState
from scipy.stats import chisquare, ks_2samp, qmc

from explore.search import informed, samplers
from explore.search.indexed import DIMENSIONS, from_unit, sobol_point
from explore.search.informed import PatternGPSampler, PatternNSGAIISampler, PatternTPESampler
from explore.search.samplers import INDEXED, SAMPLERS, DrawnSampler, ExhaustedError, make_sampler
from explore.search.spaces import PatternSpace

SPACE = PatternSpace(letters="M*-E", min_layers=3, max_layers=5, first="M*", last="-E", at_most={"*": 2})
GRID = {"lr": [1e-3, 1e-2], "pattern": SPACE, "d_model": [64, 96, 128]}
LR = FloatDistribution(1e-4, 1e-1, log=True)
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(sampler: optuna.samplers.BaseSampler, n_objectives: int = 2) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * n_objectives, sampler=sampler)


def suggest(trial: optuna.Trial) -> tuple[Any, ...]:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return lr, SPACE.suggest(trial), trial.suggest_int("d_model", 64, 128, step=32)


def run(study: optuna.Study, n_trials: int) -> list[tuple[Any, ...]]:
    drawn = []
    for _ in range(n_trials):
        trial = study.ask()
        lr, pattern, d_model = suggest(trial)
        drawn.append((lr, pattern, d_model))
        values = [distance_from_best(pattern) + abs(math.log10(lr) + 2), float(d_model * len(pattern))]
        study.tell(trial, values[: len(study.directions)])
    return drawn


def distance_from_best(pattern: str) -> float:
    return float(sum(a != b for a, b in itertools.zip_longest(pattern, "M*MEE")))


@each_sampler
@pytest.mark.parametrize("n_objectives", [1, 2])
def test_every_sampler_draws_feasible_patterns_and_registers_their_letters(name: str, n_objectives: int) -> None:
    study = study_of(DrawnSampler(name, 0, GRID), n_objectives)
    drawn = run(study, 13 if name == "gp" else 20)
    for trial, (lr, pattern, d_model) in zip(study.trials, drawn, strict=True):
        SPACE.check(pattern)
        assert trial.params == {"lr": lr, "d_model": d_model, **SPACE.params(pattern)}


@each_sampler
def test_a_study_depends_on_its_seed_and_not_on_interruptions(name: str) -> None:
    n = 12 if name == "gp" else 20
    whole = run(study_of(DrawnSampler(name, 0, GRID)), n)
    pieces = study_of(DrawnSampler(name, 0, GRID))
    drawn = run(pieces, n - 1)
    pieces.sampler = DrawnSampler(name, 0, GRID)
    assert drawn + run(pieces, 1) == whole
    other = run(study_of(DrawnSampler(name, 1, GRID)), n)
    assert (other == whole) == (name == "grid")


@pytest.mark.parametrize("name", INDEXED)
def test_a_draw_is_independent_of_other_trials(name: str) -> None:
    alone = run(study_of(DrawnSampler(name, 0, GRID)), 12)
    crowded = study_of(DrawnSampler(name, 0, GRID))
    trials = [crowded.ask() for _ in range(12)]
    order = [7, 3, 11, 0, 5, 1, 2, 4, 6, 8, 9, 10]
    found = {i: suggest(trials[i]) for i in order}
    assert [found[i] for i in range(12)] == alone
    for draw in (0, 5, 11):
        assert suggest(study_of(make_sampler(name, 0, draw, grid=GRID)).ask()) == alone[draw]


@pytest.mark.parametrize("name", INDEXED)
def test_baselines_and_retries_take_no_draws_of_others(name: str) -> None:
    alone = run(study_of(DrawnSampler(name, 0, GRID)), 4)
    study = study_of(DrawnSampler(name, 0, GRID))
    study.enqueue_trial({"lr": 0.01, "d_model": 96, **SPACE.params("M*-")})
    assert run(study, 3) == [(0.01, "M*-", 96), *alone[:2]]
    lost = study.ask()
    study.tell(lost, state=TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={"draw": lost.number})
    assert run(study, 2) == alone[2:]


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_a_given_value_does_not_move_the_others(name: str) -> None:
    for draw in range(8):
        free = suggest(study_of(make_sampler(name, 0, draw)).ask())
        study = study_of(make_sampler(name, 0, draw))
        study.enqueue_trial({"lr": 0.05})
        assert suggest(study.ask()) == (0.05, *free[1:])


def test_random_patterns_are_uniform() -> None:
    space = PatternSpace(letters="M*-", min_layers=2, max_layers=3, last="-")
    study = study_of(DrawnSampler("random", 0))
    counts = Counter(space.suggest(study.ask()) for _ in range(300))
    assert chisquare([counts[pattern] for pattern in space.patterns()]).pvalue > 1e-3


def test_quasi_random_points_are_those_of_scipys_scrambled_sequence() -> None:
    engine = qmc.Sobol(DIMENSIONS, scramble=True, rng=np.random.default_rng(np.random.SeedSequence([7])))
    points = engine.random(32)
    assert np.array_equal(points, [sobol_point(7, draw) for draw in range(32)])


def test_quasi_random_draws_fill_every_stratum_once() -> None:
    study = study_of(DrawnSampler("qmc", 3))
    values = [study.ask().suggest_float("x", 0, 1) for _ in range(16)]
    assert sorted(int(16 * value) for value in values) == list(range(16))


@pytest.mark.parametrize(
    "distribution",
    [
        IntDistribution(3, 17),
        IntDistribution(64, 224, step=32),
        IntDistribution(1, 100, log=True),
        FloatDistribution(-1.0, 2.0),
        FloatDistribution(1e-5, 1e-1, log=True),
        FloatDistribution(0.1, 0.9, step=0.2),
        CategoricalDistribution(("a", "b", None)),
    ],
    ids=str,
)
def test_quantiles_are_those_of_optunas_random_draws(distribution: BaseDistribution) -> None:
    study = study_of(optuna.samplers.RandomSampler(seed=0))
    study.ask()
    theirs = [study.sampler.sample_independent(study, study.trials[0], "x", distribution) for _ in range(4000)]
    ours = [from_unit((i + 0.5) / 4000, distribution) for i in range(4000)]
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in ours)
    numbers = ([distribution.to_internal_repr(value) for value in values] for values in (ours, theirs))
    assert ks_2samp(*numbers).statistic < 0.04


def test_a_grid_is_gone_through_once_and_then_is_exhausted() -> None:
    grid = {"pattern": ["M-", "ME", "*-"], "d_model": [64, 128]}
    space = PatternSpace(letters="M*-E", min_layers=2, max_layers=2)
    study = study_of(DrawnSampler("grid", 5, grid))
    found = []
    for _ in range(6):
        trial = study.ask()
        found.append((trial.suggest_int("d_model", 64, 128, step=32), space.suggest(trial)))
    assert found == [(d, pattern) for pattern in grid["pattern"] for d in (64, 128)]
    trial = study.ask()
    with pytest.raises(ExhaustedError, match="all 6 points of the grid have been drawn"):
        space.suggest(trial)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"lr": [0.01]}, "grid: no values for 'd_model'; it has lr"),
        ({"d_model": [65]}, "grid: 65 is not a value that 'd_model' can have"),
        ({"d_model": ["wide"]}, "grid: 'wide' is not a value that 'd_model' can have"),
        ({"d_model": []}, "grid: 'd_model' has no values"),
        ({}, "grid: the sampler 'grid' needs a mapping"),
    ],
)
def test_a_mistake_in_a_grid_is_named(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_of(DrawnSampler("grid", 0, grid)).ask().suggest_int("d_model", 64, 128, step=32)


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="sampler must be one of random, qmc, grid, tpe, nsga2, nsga3, gp, got 'cmaes'"
    ):
        make_sampler("cmaes", 0, 0)


def test_gp_names_its_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "find_spec", lambda library: None if library == "torch" else library)
    with pytest.raises(ValueError, match="sampler: 'gp' needs torch, which cannot be imported"):
        make_sampler("gp", 0, 0)


def history(sampler: optuna.samplers.BaseSampler, patterns: list[str]) -> optuna.Study:
    """A study that has tried these patterns, best first."""
    study = study_of(sampler, 1)
    distributions = {name: CategoricalDistribution(SPACE.choices) for name in SPACE.names()}
    for value, pattern in enumerate(patterns):
        study.add_trial(
            optuna.trial.create_trial(params=SPACE.params(pattern), distributions=distributions, value=float(value))
        )
    return study


def test_tpe_draws_near_good_patterns_and_away_from_bad_ones() -> None:
    good, bad = ["M*MEE", "M*MME"], ["*----", "**---", "*-E--", "*E---"]
    patterns = good + bad * 5
    near = {"tpe": 0, "random": 0}
    for draw, name in itertools.product(range(30), near):
        pattern = SPACE.suggest(history(make_sampler(name, 0, draw), patterns).ask())
        near[name] += informed.distance(pattern, good[0]) <= 2
    assert near["tpe"] >= 20
    assert near["random"] <= 10


def test_tpe_prefers_patterns_near_good_and_far_from_bad_ones() -> None:
    """The ratio of sums of exp(-distance) with the uniform part, computed by hand."""
    level = 0.1
    density = (math.exp(-1) / level + math.exp(-2) / level + 1) / 3
    assert informed._density("M*-", ["M*E", "MEE"], level) == pytest.approx(density)


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_nsga_crosses_patterns_of_the_better_half(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mutation every child is the start of one parent and the end of another, the best of two generations."""
    monkeypatch.setattr(PatternSpace, "mutate", lambda space, pattern, rng: pattern)
    study = study_of(DrawnSampler(name, 0))
    drawn = []
    for _ in range(3 * informed.POPULATION):
        trial = study.ask()
        drawn.append(SPACE.suggest(trial))
        study.tell(trial, [distance_from_best(drawn[-1])] * 2)
    parents = sorted(drawn[: 2 * informed.POPULATION], key=distance_from_best)[: informed.POPULATION]
    children = drawn[2 * informed.POPULATION :]
    worst = distance_from_best(parents[-1])
    able = {pattern for pattern in drawn[: 2 * informed.POPULATION] if distance_from_best(pattern) <= worst}
    joined = {a[:i] + b[j:] for a in able for b in able for i in range(len(a) + 1) for j in range(len(b) + 1)}
    assert set(children) <= joined
    assert set(children) - able
    assert able < set(drawn[: 2 * informed.POPULATION])


def test_the_pattern_nearest_to_the_letters_of_gp_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["-", "*", "*", "*", "."]
    params = {"lr": 0.02, **dict(zip(SPACE.names(), asked, strict=True))}
    study = history(make_sampler("gp", 0, 0), ["M-E", "M*E"])
    study.add_trial(optuna.trial.create_trial(params={"lr": 0.01}, distributions={"lr": LR}, value=1.0))
    space = {"lr": LR, **study.trials[0].distributions}
    monkeypatch.setattr(GPSampler, "infer_relative_search_space", lambda *_: space)
    monkeypatch.setattr(GPSampler, "sample_relative", lambda *_: dict(params))
    trial = study.ask()
    pattern = SPACE.suggest(trial)
    assert pattern == SPACE.nearest(asked) != "".join(asked).rstrip(".")
    assert trial.params == SPACE.params(pattern)
    assert trial.suggest_float("lr", 1e-4, 1e-1, log=True) == 0.02
    study.tell(trial, state=TrialState.PRUNED)  # asked for again, the same is not given again
    again = SPACE.suggest(study.ask())
    assert again != pattern
    assert informed.distance(again, pattern) <= 2


@pytest.mark.parametrize("sampler", [PatternTPESampler, PatternNSGAIISampler, PatternGPSampler])
def test_a_pattern_may_be_drawn_before_or_after_other_parameters(sampler: Any) -> None:
    for order in (0, 1):
        study = study_of(sampler(0, np.random.default_rng(0)))
        for i in range(12 if sampler is PatternGPSampler else informed.POPULATION + 4):
            trial = study.ask()
            calls = [lambda: trial.suggest_float("lr", 0, 1), lambda: SPACE.suggest(trial)]  # noqa: B023
            answers = [call() for call in (calls if order else calls[::-1])]
            SPACE.check(next(answer for answer in answers if isinstance(answer, str)))
            study.tell(trial, [float(i % 5), -float(i % 7)])


def test_two_patterns_of_a_trial_are_drawn_independently() -> None:
    for name in ("random", "qmc", "tpe", "nsga2"):
        study = study_of(DrawnSampler(name, 0))
        pairs = []
        for _ in range(24):
            trial = study.ask()
            pairs.append((SPACE.suggest(trial, "encoder"), SPACE.suggest(trial, "decoder")))
            study.tell(trial, [1.0, 2.0])
        assert sum(a != b for a, b in pairs) > 12


def test_a_sampler_draws_at_random_if_all_trials_were_pruned() -> None:
    study = study_of(DrawnSampler("nsga2", 0))
    for _ in range(12):
        trial = study.ask()
        suggest(trial)
        study.tell(trial, state=TrialState.PRUNED)
    trial = study.ask()
    assert suggest(trial) == suggest(study_of(make_sampler("random", 0, 12)).ask())
