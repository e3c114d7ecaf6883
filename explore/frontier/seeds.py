"""Averages runs that differ only in their seed into one row with means and intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from explore.frontier.intervals import t_quantile
from explore.quantities import EVAL_DATA, PARENTS, columns, quantity

SAME = ("name", "family", "pattern", "status", *PARENTS, "corpus", EVAL_DATA, "flops_run", "tokens")
"""Columns that runs of one group share, besides all settings and costs."""

POOL = (EVAL_DATA, "d_model")
"""Columns shared by the groups over which the spread between seeds is pooled."""

N_SEEDS, SEEDS = "n_seeds", "seeds"
HALF_WIDTH = "{}_half_width"
"""Suffix of the column with the half-width of a mean's interval."""


def seed_means(runs: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Returns one row for each group of runs that differ only in their seed.

    The interval of a mean is a t interval; its standard deviation is pooled over the groups with the same data and
    width, since two or three seeds say little about a spread. A group of one run has no interval.

    Args:
        runs: a table as `load_runs` gives it, or any with some of its columns; without a column `seed` nothing is
            grouped.
        level: share of such intervals that contain the true mean.

    Returns:
        The columns of `runs`, with means of measured columns and the first value of all others; `n_seeds`,
        `seeds` (their numbers, as text), and for each measure of quality `<name>_half_width`, NaN for one run.
    """
    table = runs.reset_index(drop=True)
    known = [each for each in columns(table.columns) if each.name in table]
    keys = _keys(table)
    if not keys:
        alone = table.assign(**{N_SEEDS: 1, SEEDS: table["seed"].astype("str") if "seed" in table else ""})
        return alone.assign(**{HALF_WIDTH.format(each.name): np.nan for each in known if each.is_quality})
    group = seed_groups(table)
    groups = table.groupby(group, sort=True)
    first = groups.head(1)
    found = first.set_axis(group[first.index], axis="index").sort_index()
    found[N_SEEDS] = groups.size()
    found[SEEDS] = groups["seed"].agg(_numbers)
    for each in known:
        if each.is_number and each.name not in keys and each.name != "seed":
            values = pd.to_numeric(table[each.name], errors="coerce").astype("float64")
            found[each.name] = values.groupby(group).mean()
            if each.is_quality:
                found[HALF_WIDTH.format(each.name)] = _half_widths(table, values, group, level)
    return found.reset_index(drop=True)


def seed_groups(runs: pd.DataFrame) -> pd.Series[int]:
    """The number of each run's group. Runs of one group differ only in their seed."""
    if keys := _keys(runs):
        return runs.groupby(keys, dropna=False, sort=False).ngroup()
    return pd.Series(range(len(runs)), index=runs.index)


def _keys(runs: pd.DataFrame) -> list[str]:
    """Columns that runs of one group share; none if nothing can be grouped."""
    if runs.empty or "seed" not in runs:
        return []
    known = [each for each in columns(runs.columns) if each.name in runs]
    return [each.name for each in known if (each.is_known or each.name in SAME) and each.name != "seed"]


def grouped(name: str, row: dict[str, object]) -> str:
    """Formats a mean for a table, with the half-width of its interval if there are several seeds."""
    text, half = quantity(name).text(row.get(name)), row.get(HALF_WIDTH.format(name))
    return f"{text} ±{quantity(name).text(half)}" if text and isinstance(half, float) and math.isfinite(half) else text


def _numbers(seeds: pd.Series[Any]) -> str:
    """Seeds as text: `0`, `0-4`, or `0, 7`."""
    found = sorted({int(seed) for seed in seeds.dropna()})
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}-{found[-1]}"
    return ", ".join(map(str, found))


def _half_widths(
    table: pd.DataFrame, values: pd.Series[float], group: pd.Series[int], level: float
) -> pd.Series[float]:
    """The half-width of the interval of each group's mean."""
    pool = [name for name in POOL if name in table]
    squares = (values - values.groupby(group).transform("mean")) ** 2
    pools = table.groupby(pool, dropna=False, sort=False).ngroup() if pool else group * 0
    counted = values.notna()
    dof = counted.groupby(pools).sum() - group[counted].groupby(pools[counted]).nunique()
    sd = (squares.groupby(pools).sum() / dof.where(dof > 0)) ** 0.5
    pool_of = pools.groupby(group).first()
    n = counted.groupby(group).sum()
    half = pool_of.map(sd * dof.map(lambda each: t_quantile(each, level) if each > 0 else np.nan)) / n**0.5
    return half.where(n > 1)
