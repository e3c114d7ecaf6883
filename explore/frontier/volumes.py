"""Hypervolumes of points with several seeds, with intervals that are valid despite ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, check_columns, oriented_reference
from explore.frontier.intervals import Interval, check_level
from explore.frontier.repeats import Repeats, repeats

TIED = 3.0
"""Distance from the front, in standard errors, within which a mean may be tied with it."""


class _Volume(NamedTuple):
    """A hypervolume of means, and draws of its error.

    Attributes:
        found: hypervolume of the means.
        bias: its upward bias, by the bootstrap.
        most: draws of the error if all possible ties hold: its largest case.
        least: draws of the error if no ties hold, so that no minimum is taken: its smallest case.
    """

    found: float
    bias: float
    most: Floats
    least: Floats


def hypervolume_interval(
    table: pd.DataFrame,
    by: Sequence[str],
    reference: tuple[float, float],
    cost: str = "flops_run",
    error: str = "val_bpb",
    level: float = 0.95,
    n_bootstrap: int = 4000,
    seed: int = 0,
) -> Interval:
    """Hypervolume of the means over seeds, corrected for bias, with an interval.

    The minimum of several noisy means is biased low, so the front of means reaches too far, and the more so the more
    points are tied on it. `estimate` subtracts the bias found by a parametric bootstrap (normal noise that depends on
    the cost). With ties that correction is too small and a bootstrap interval too high. So the lower end is valid even
    if all points within three standard errors of the front lie on it, and the upper end even if none does.

    Args:
        by: columns whose values identify a point.
        reference: as for `hypervolume`.

    Returns:
        Decades of cost times units of error.

    Raises:
        ValueError: a column is missing, a cost is not positive, higher costs are better, or no point has two runs.

    Source: selection of tied points and the least favourable case follow Andrews and Soares, Inference for parameters
    defined by moment inequalities, 2010.
    """
    points, reference = repeats(table, by, cost, error), oriented_reference(reference, cost, error)
    volume = _volume(points, reference, cost, n_bootstrap, np.random.default_rng(seed))
    return _interval(volume.found, volume.bias, volume.most, volume.least, level)


def hypervolume_difference(
    table: pd.DataFrame,
    group: str,
    pair: tuple[str, str],
    by: Sequence[str],
    reference: tuple[float, float],
    cost: str = "flops_run",
    error: str = "val_bpb",
    level: float = 0.95,
    n_bootstrap: int = 4000,
    seed: int = 0,
) -> Interval:
    """Hypervolume of one group of runs minus that of another; above 0 the first is better.

    Args:
        group: column of the group.
        pair: the two values of that column; the noise is estimated from the runs of both.

    Raises:
        ValueError: as for `hypervolume_interval`, or a group has no runs.
    """
    check_columns(table, [group])
    reference = oriented_reference(reference, cost, error)
    both = repeats(table[table[group].isin(pair)], [group, *by], cost, error)
    rng, groups = np.random.default_rng(seed), both.table[group]
    if missing := [name for name in pair if not (groups == name).any()]:
        raise ValueError(f"table: no row of {group} {missing[0]!r} has a finite {cost} and {error}")
    one, other = (
        _volume(both.take((groups == name).to_numpy(dtype=bool)), reference, cost, n_bootstrap, rng) for name in pair
    )
    found, bias = one.found - other.found, one.bias - other.bias
    return _interval(found, bias, one.most - other.least, one.least - other.most, level)


def _volume(points: Repeats, reference: tuple[float, float], cost: str, n: int, rng: np.random.Generator) -> _Volume:
    limit_cost, limit = reference
    if (points.cost <= 0).any():
        raise ValueError(f"{cost}: must be positive on a log axis, got {points.cost.min():g}")
    if not (math.isfinite(limit_cost) and limit_cost > 0 and math.isfinite(limit)):
        raise ValueError(f"reference: must be finite with a positive {cost}, got {reference!r}")
    order = np.argsort(points.cost, kind="stable")
    order = order[points.cost[order] < limit_cost]
    widths = np.diff(np.log10(np.append(points.cost[order], limit_cost)))
    means, variances = points.error[order], (points.noise.sd**2 / points.n_seeds)[order]
    noise = points.draws(n, rng)[:, order]

    def area(errors: Floats) -> Floats:
        return np.asarray(np.maximum(limit - errors, 0.0) @ widths, dtype=np.float64)

    front = np.minimum.accumulate(means)
    most, least = np.empty_like(noise), np.empty_like(noise)
    for i in range(len(order)):
        best = int(np.argmin(means[: i + 1]))
        near = means[: i + 1] - means[best] <= TIED * np.sqrt(variances[: i + 1] + variances[best])
        most[:, i], least[:, i] = noise[:, : i + 1][:, near].min(axis=1), noise[:, best]
    found = float(area(front))
    bias = float(area(np.minimum.accumulate(means + noise, axis=1)).mean()) - found
    return _Volume(found, bias, area(front + most) - found, area(front + least) - found)


def _interval(found: float, bias: float, most: Floats, least: Floats, level: float) -> Interval:
    tail = (1 - check_level(level)) / 2
    low, high = found - float(np.quantile(most, 1 - tail)), found - float(np.quantile(least, tail))
    return Interval(min(max(found - bias, low), high), low, high, level)
