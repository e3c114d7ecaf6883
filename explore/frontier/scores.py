"""Intervals for proportions: accuracy over paradigms of grammar, and the share of runs that succeed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, known_rows
from explore.frontier.intervals import Interval, between, check_level

MIN_CLUSTERS = 5


def cluster_interval(
    scores: pd.DataFrame,
    value: str = "accuracy",
    cluster: str = "uid",
    baseline: pd.DataFrame | None = None,
    level: float = 0.95,
    n_bootstrap: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean over clusters, with an interval that resamples whole clusters: sentences of a paradigm fail together.

    Rows of one cluster (its pairs, or its accuracy from several seeds) are averaged first, so every cluster has equal
    weight. The interval is a studentised bootstrap. It covers other paradigms of the same kind, not other seeds.

    Args:
        scores: one or more rows per cluster.
        baseline: scores of another model; the interval is then that of the difference, paired by cluster.

    Raises:
        ValueError: a column is missing, the clusters of both models differ, or there are fewer than five.

    Source: Davison and Hinkley, Bootstrap Methods and their Application, section 5.2.1.
    """
    means = known_rows(scores, [cluster], value).groupby(cluster)[value].mean()
    if baseline is not None:
        others = known_rows(baseline, [cluster], value).groupby(cluster)[value].mean()
        if unpaired := sorted(map(str, set(means.index) ^ set(others.index))):
            raise ValueError(f"{cluster}: both models must have the same; only one has {', '.join(unpaired[:5])}")
        means = means - others
    values = means.to_numpy(dtype=np.float64)
    if len(values) < MIN_CLUSTERS:
        raise ValueError(f"{cluster}: must have at least {MIN_CLUSTERS} clusters, got {len(values)}")
    mean, error = float(values.mean()), _standard_errors(values)
    resampled = np.random.default_rng(seed).choice(values, size=(n_bootstrap, len(values)))
    errors = _standard_errors(resampled)
    t = (resampled.mean(axis=1) - mean)[errors > 0] / errors[errors > 0]
    low, high = between(t, level) if len(t) else (0.0, 0.0)
    bounds = (0.0, 1.0) if baseline is None else (-1.0, 1.0)
    ends = np.clip([mean - float(high) * float(error), mean - float(low) * float(error)], *bounds)
    return Interval(mean, float(ends[0]), float(ends[1]), level)


def _standard_errors(values: Floats) -> Floats:
    return np.asarray(values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1]), dtype=np.float64)


def success_fraction(successes: int, n: int, level: float = 0.95) -> Interval:
    """Share of runs that succeeded, with Wilson's score interval: for tasks that a run either solves or not.

    Raises:
        ValueError: not 0 <= `successes` <= `n`, or `n` is 0.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    from scipy import stats

    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes: must lie between 0 and n, and n above 0, got {successes!r} of {n!r}")
    ends = stats.binomtest(successes, n).proportion_ci(check_level(level), method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high), level)


def resolvable_share(n: int, level: float = 0.95) -> float:
    """The smallest share of n runs whose difference from no success in n runs is resolved; infinity without one."""
    shares = (k / n for k in range(1, n + 1) if success_difference(k, n, 0, n, level).low > 0)
    return next(shares, math.inf)


def success_difference(
    successes: int, n: int, baseline_successes: int, baseline_n: int, level: float = 0.95
) -> Interval:
    """Difference of two shares of successes (arm minus baseline), with Newcombe's interval from two of Wilson's.

    Runs are treated as independent; with shared seeds that affect both alike, the interval is too wide.

    Raises:
        ValueError: as for `success_fraction`.

    Source: Newcombe, Interval estimation for the difference between independent proportions, 1998, method 10.
    """
    one, other = success_fraction(successes, n, level), success_fraction(baseline_successes, baseline_n, level)
    difference = one.estimate - other.estimate
    return Interval(
        difference,
        difference - math.hypot(one.estimate - one.low, other.high - other.estimate),
        difference + math.hypot(one.high - one.estimate, other.estimate - other.low),
        level,
    )
