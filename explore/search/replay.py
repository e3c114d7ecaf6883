"""Benchmarks samplers without training: each searches a grid whose results are all known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState

from explore.frontier import hypervolume
from explore.search.samplers import DrawnSampler, check_sampler
from explore.search.spaces import PatternSpace

SIMPLEST_FIRST = ("random", "qmc", "tpe", "nsga2", "nsga3", "gp")
BASELINE = "random"
COST, ERROR = "flops_run", "val_bpb"
REPEATS = 200
"""Consecutive repeated draws after which a search stops."""
RESAMPLES = 10_000


class Space(NamedTuple):
    """A full grid: a space of patterns, and the values of further columns."""

    patterns: PatternSpace
    axes: Mapping[str, tuple[Any, ...]]


def space_of(table: pd.DataFrame, axes: Sequence[str] = ("d_model",)) -> Space:
    """Finds the space whose points the table contains exactly once each.

    Raises:
        ValueError: a column is missing, a result is not finite, a point is missing or repeated, or the patterns are
            not all those allowed by the rules on neighbours, ends and lengths that they share.
    """
    for column in ("pattern", *axes, COST, ERROR):
        if column not in table:
            raise ValueError(f"table: column {column!r} is missing; it has {', '.join(map(str, table.columns))}")
    if not len(table) or not np.isfinite(table[[COST, ERROR]].to_numpy(dtype=float)).all():
        raise ValueError(f"table: {COST} and {ERROR} must be there for every row")
    patterns = [str(pattern) for pattern in table["pattern"].unique()]
    letters = "".join(sorted(set("".join(patterns))))
    before = {letter: {p[i - 1] for p in patterns for i in range(1, len(p)) if p[i] == letter} for letter in letters}
    space = PatternSpace(
        letters=letters,
        min_layers=min(map(len, patterns)),
        max_layers=max(map(len, patterns)),
        first="".join(sorted({p[0] for p in patterns})),
        last="".join(sorted({p[-1] for p in patterns})),
        after={letter: "".join(sorted(those)) for letter, those in before.items()},
    )
    if space.size != len(patterns):
        raise ValueError(f"table: it has {len(patterns)} patterns of a space of {space.size}; all are needed")
    values = {axis: tuple(sorted(table[axis].unique().tolist())) for axis in axes}
    points = int(np.prod([len(column) for column in values.values()], initial=space.size))
    if table.duplicated(["pattern", *axes]).any() or len(table) != points:
        raise ValueError(f"table: {len(table)} rows of a grid of {points}; every point must be there once")
    return Space(space, values)


def regret(table: pd.DataFrame, found: pd.DataFrame) -> float:
    """Share of the whole table's hypervolume that the found rows lack; 0 means that the whole front was found.

    The reference point is the table's worst value in each column; FLOPs are on a log axis.
    """
    reference = (float(table[COST].max()), float(table[ERROR].max()))
    return 1 - hypervolume(found, reference, COST, ERROR) / hypervolume(table, reference, COST, ERROR)


def sampler_regrets(
    table: pd.DataFrame,
    samplers: Sequence[str] = SIMPLEST_FIRST,
    n_trials: Sequence[int] = (40,),
    seeds: Sequence[int] = range(30),
    axes: Sequence[str] = ("d_model",),
) -> Iterator[dict[str, Any]]:
    """Lets every sampler search the table, once for every seed.

    As in a sweep, a draw that repeats an experiment is reported as pruned, costs nothing and is drawn again, up to 200
    times in a row. The objectives `val_bpb` and `flops_run` are minimised.

    Args:
        n_trials: numbers of experiments after which regret is measured.

    Yields:
        sampler, seed, trials, regret, and repeats (number of repeated draws so far).
    """
    for name in samplers:
        check_sampler(name)
        if name not in SIMPLEST_FIRST:
            raise ValueError(f"sampler must be one of {', '.join(SIMPLEST_FIRST)}, which draw at random, got {name!r}")
    if wrong := [n for n in n_trials if not 1 <= n <= len(table)]:
        raise ValueError(f"trials must be between 1 and {len(table)}, the rows of the table, got {wrong[0]}")
    space = space_of(table, axes)
    for name in samplers:
        for seed in seeds:
            found, repeats = search_table(table, space, name, seed, max(n_trials))
            for n in sorted(n_trials):
                so_far = table.iloc[found[:n]]
                repeated = repeats[min(n, len(found)) - 1] if len(found) >= n else repeats[-1]
                yield {
                    "sampler": name,
                    "seed": seed,
                    "trials": n,
                    "regret": regret(table, so_far),
                    "repeats": repeated,
                }


def search_table(table: pd.DataFrame, space: Space, name: str, seed: int, n_trials: int) -> tuple[list[int], list[int]]:
    """One search of the table.

    Returns:
        Indices of the rows in the order found, and the number of repeats before each. If the search stopped early, the
        second list has one more entry, the total.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    places = {point: i for i, point in enumerate(table[["pattern", *space.axes]].itertuples(index=False, name=None))}
    results = table[[ERROR, COST]].to_numpy(dtype=float).tolist()
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=DrawnSampler(name, seed))
    found: list[int] = []
    repeats: list[int] = []
    total = in_a_row = 0
    while len(found) < n_trials and in_a_row < REPEATS:
        trial = study.ask()
        point = (space.patterns.suggest(trial), *(_suggest(trial, axis, space.axes[axis]) for axis in space.axes))
        place = places[point]
        if place in found:
            study.tell(trial, state=TrialState.PRUNED)
            total, in_a_row = total + 1, in_a_row + 1
            continue
        study.tell(trial, results[place])
        found.append(place)
        repeats.append(total)
        in_a_row = 0
    return found, repeats if in_a_row < REPEATS else [*repeats, total]


def mean_regrets(results: pd.DataFrame) -> pd.DataFrame:
    """Mean regret over seeds, and its difference from random draws, for every number of trials and sampler.

    Differences are paired by seed; intervals are 95% bootstrap intervals over seeds.

    Returns:
        trials, sampler, regret, regret_low, regret_high, difference, difference_low, difference_high, repeats.
    """
    rows = []
    for n, group in results.groupby("trials"):
        regrets = group.pivot(index="seed", columns="sampler", values="regret")
        for name in [name for name in SIMPLEST_FIRST if name in regrets]:
            row: dict[str, Any] = {"trials": n, "sampler": name, **_mean("regret", regrets[name])}
            if BASELINE in regrets:
                row |= _mean("difference", regrets[name] - regrets[BASELINE])
            rows.append({**row, "repeats": group.loc[group["sampler"] == name, "repeats"].mean()})
    return pd.DataFrame(rows)


class Verdict(NamedTuple):
    """The sampler with the lowest mean regret, and the simplest sampler not resolved as worse."""

    least: str
    default: str


def judge(results: pd.DataFrame, n_trials: int) -> Verdict:
    """Chooses the best sampler as the default, or the simplest one not resolved from it.

    A sampler is worse than another if the 95% interval of their difference, paired by seed, is above zero.
    """
    regrets = results[results["trials"] == n_trials].pivot(index="seed", columns="sampler", values="regret")
    least = str(regrets.mean().idxmin())
    names = [name for name in SIMPLEST_FIRST if name in regrets]
    tied = [name for name in names if _mean("gap", regrets[name] - regrets[least])["gap_low"] <= 0]
    return Verdict(least, tied[0])


def _mean(name: str, values: pd.Series[Any]) -> dict[str, float]:
    """The mean and its 95% bootstrap interval."""
    numbers = values.to_numpy(dtype=float)
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(axis=1), [0.025, 0.975])
    return {name: float(numbers.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def _suggest(trial: optuna.Trial, name: str, values: tuple[Any, ...]) -> Any:
    """Suggests an integer if the values are evenly spaced integers, else one of the values."""
    if len(values) > 1 and all(isinstance(value, int) for value in values):
        step = values[1] - values[0]
        if values == tuple(range(values[0], values[-1] + 1, step)):
            return trial.suggest_int(name, values[0], values[-1], step=step)
    return trial.suggest_categorical(name, values)
