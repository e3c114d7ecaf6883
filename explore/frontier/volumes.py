"""Hypervolumes of points that were run from several seeds, with intervals that ties do not fool."""

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
"""Standard errors of a difference within which a mean may be level with the front."""


class _Volume(NamedTuple):
    """A hypervolume of means, and draws of its error.

    Attributes:
        found: hypervolume of the means.
        bias: what the bootstrap says that it is too large by.
        most: draws of the error if all points that may be tied are: as large as it gets.
        least: draws if none is, so that no minimum is taken: as small as it gets.
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
    """Hypervolume of the means over seeds, less its bias, with an interval.

    The least of several noisy means is too low, so the front of means reaches too far, the more points are tied on it.
    `estimate` is lower by the bias that a parametric bootstrap finds (normal noise, which follows the cost). Where
    points are tied that is too little, and a bootstrap's interval too high: so the lower end holds even if all points
    within three standard errors of the front lie on it, and the upper end even if none does.

    Args:
        by: columns whose values tell points apart.
        reference: as for `hypervolume`.

    Returns:
        Decades of cost times units of error.

    Raises:
        ValueError: a column is missing, a cost is not positive or better where higher, or no point has two runs.

    Source: tied points by selection and the least favourable case, Andrews and Soares, Inference for parameters defined
    by moment inequalities, 2010.
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
    """Hypervolume of the first of two groups of runs less that of the second; above 0 the first is better.

    Args:
        group: column that tells the groups apart.
        pair: its two values; the noise is found from the runs of both.

    Raises:
        ValueError: as `hypervolume_interval` does, or a group has no runs.
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
