"""The front of points with several seeds: which are on it, which are behind, and which are not resolved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats
from explore.frontier.front import pareto_front
from explore.frontier.intervals import NOT_RESOLVED, t_quantile
from explore.frontier.noise import NoiseKind
from explore.frontier.repeats import Repeats, repeats

ON_FRONT, BEHIND = "on the front", "behind"


def seed_bands(
    table: pd.DataFrame,
    by: Sequence[str],
    cost: str = "flops_run",
    error: str = "val_bpb",
    level: float = 0.95,
    n_bootstrap: int = 4000,
    seed: int = 0,
    noise: NoiseKind = "auto",
) -> pd.DataFrame:
    """Means over seeds with t intervals, and a verdict on whether each point is on the Pareto front.

    The variance between seeds depends on the cost as `noise` specifies. A rival of a point is another that costs no
    more. A point is `on the front` if it beats all rivals at once with a probability of at least `level`, `behind` if
    the hypothesis that no rival beats it is rejected (by the largest t statistic over the rivals, so that many ties do
    not add up to a verdict), and `not resolved` otherwise. For each point, either verdict is wrong with a probability
    of at most 1 - `level`. Seeds are treated as independent between points.

    Args:
        by: columns whose values identify a point, such as arm and size.
        noise: how the noise changes with the cost, as in `explore.frontier.noise.fit_noise`.

    Returns:
        One row per point: the columns `by`, `cost` and `error` (means), low and high (interval of the mean error),
        n_seeds, sd, on_front (by the means), p_front (parametric bootstrap), p_value (of the hypothesis that the point
        is on the front), and standing.

    Raises:
        ValueError: a column is missing, no point has two runs, or `level` is not between 0 and 1.
    """
    points = repeats(table, by, cost, error, noise)
    t = np.array([t_quantile(dof, level) for dof in points.noise.dof])
    half = t * points.noise.sd / np.sqrt(points.n_seeds)
    p_front, p_value = _front_tests(points, n_bootstrap, np.random.default_rng(seed))
    standing = np.where(p_value <= 1 - level, BEHIND, NOT_RESOLVED)
    return points.table.drop(columns="n_seeds").assign(
        low=points.table[error] - half,
        high=points.table[error] + half,
        n_seeds=points.table["n_seeds"],
        sd=points.noise.sd,
        on_front=pareto_front(points.table, cost, error),
        p_front=p_front,
        p_value=p_value,
        standing=np.where(p_front >= level, ON_FRONT, standing),
    )


def _front_tests(points: Repeats, n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    draws = points.draws(n, rng)
    means = points.error + draws
    variance = np.maximum(points.noise.sd**2, np.finfo(np.float64).tiny) / points.n_seeds
    p_front, p_value = np.ones(len(points.error)), np.ones(len(points.error))
    for i in range(len(points.error)):
        rivals = points.cost <= points.cost[i]
        rivals[i] = False
        if rivals.any():
            p_front[i] = (means[:, i] < means[:, rivals].min(axis=1)).mean()
            scale = np.sqrt(variance[i] + variance[rivals])
            found = ((points.error[i] - points.error[rivals]) / scale).max()
            by_chance = ((draws[:, [i]] - draws[:, rivals]) / scale).max(axis=1)
            p_value[i] = (1 + (by_chance >= found).sum()) / (1 + n)
    return p_front, p_value
