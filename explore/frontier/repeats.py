"""Points that were run from several seeds: their means, and one spread pooled over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, known_rows, oriented


@dataclass(frozen=True)
class Repeats:
    """Points with their means over seeds; the noise of a run is normal, with one standard deviation at all points.

    Attributes:
        table: a row a point: its labels, mean cost, mean error, and `n_seeds`.
        cost: mean cost of each point; lower is better, so values of which higher is better are negated.
        error: mean error of each point, in the same way.
        n_seeds: runs of each point.
        sd: standard deviation of the error of one run, pooled over points; NaN where no point was repeated.
        dof: degrees of freedom of `sd`.
    """

    table: pd.DataFrame
    cost: Floats
    error: Floats
    n_seeds: Floats
    sd: float
    dof: int

    def standard_draws(self, n: int, rng: np.random.Generator, n_seeds: Floats | None = None) -> Floats:
        """Draws (n, points) of the errors of the means over `sd`: multivariate t, as `sd` is an estimate too.

        Args:
            n_seeds: runs of other points with the same noise, instead of those of these.

        Raises:
            ValueError: no point was repeated.
        """
        self.need_spread()
        scale = np.sqrt(rng.chisquare(self.dof, size=(n, 1)) / self.dof)
        runs = self.n_seeds if n_seeds is None else n_seeds
        return np.asarray(rng.standard_normal((n, len(runs))) / np.sqrt(runs) / scale)

    def need_spread(self) -> None:
        """Raises ValueError when no point was repeated."""
        if not self.dof:
            raise ValueError("table: no point has two runs; a spread needs a point that was run from several seeds")


def repeats(table: pd.DataFrame, by: Sequence[str], cost: str, error: str) -> Repeats:
    """Averages the runs of each point; rows without a finite cost and error are left out.

    Args:
        by: columns whose values tell points apart.

    Raises:
        ValueError: a column is missing, or no row is left.
    """
    rows = known_rows(table, by, cost, error)
    groups = rows.groupby(list(by), sort=False, dropna=False)
    means = groups[[cost, error]].mean().assign(n_seeds=groups.size()).reset_index()
    squares = float(((rows[error] - groups[error].transform("mean")) ** 2).sum())
    dof = len(rows) - len(means)
    return Repeats(
        means,
        oriented(means, cost),
        oriented(means, error),
        means["n_seeds"].to_numpy(dtype=np.float64),
        math.sqrt(squares / dof) if dof else math.nan,
        dof,
    )
