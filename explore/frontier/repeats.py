"""Points with several seeds: their means, and the noise of one run at each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from explore.frontier.columns import Floats, known_rows, oriented
from explore.frontier.noise import Noise, NoiseKind, fit_noise


@dataclass(frozen=True)
class Repeats:
    """Points with their means over seeds; noise is assumed normal.

    Attributes:
        table: one row per point: its labels, mean cost, mean error, and `n_seeds`.
        cost: mean cost of each point; negated if higher is better.
        error: mean error of each point; negated if higher is better.
        n_seeds: number of runs of each point.
        spread: noise of one run at each point; None without repeats.
    """

    table: pd.DataFrame
    cost: Floats
    error: Floats
    n_seeds: Floats
    spread: Noise | None

    @property
    def noise(self) -> Noise:
        """The noise of one run at each point.

        Raises:
            ValueError: no point was repeated.
        """
        if self.spread is None:
            raise ValueError("table: no point has two runs; at least one point must have several seeds")
        return self.spread

    def draws(self, n: int, rng: np.random.Generator) -> Floats:
        """Draws errors (n, points) of the means.

        Raises:
            ValueError: no point was repeated.
        """
        return self.noise.draws(n, self.n_seeds, rng)

    def take(self, points: npt.NDArray[np.bool_]) -> Repeats:
        """A subset of the points, with the noise estimated from all."""
        return Repeats(
            self.table[points].reset_index(drop=True),
            self.cost[points],
            self.error[points],
            self.n_seeds[points],
            self.noise.take(points),
        )


def repeats(table: pd.DataFrame, by: Sequence[str], cost: str, error: str, noise: NoiseKind = "auto") -> Repeats:
    """Averages the runs of each point; rows without a finite cost and error are left out.

    Args:
        by: columns whose values identify a point.
        noise: how the noise changes with the cost, as in `fit_noise`.

    Raises:
        ValueError: a column is missing, or no row is left.
    """
    rows = known_rows(table, by, cost, error)
    groups = rows.groupby(list(by), sort=False, dropna=False)
    means = groups[[cost, error]].mean().assign(n_seeds=groups.size()).reset_index()
    off = (rows[error] - groups[error].transform("mean")) ** 2
    squares = off.groupby(groups.ngroup()).sum().to_numpy(dtype=np.float64)
    n_seeds = means["n_seeds"].to_numpy(dtype=np.float64)
    sizes = means[cost].to_numpy(dtype=np.float64)
    return Repeats(
        means,
        oriented(means, cost),
        oriented(means, error),
        n_seeds,
        fit_noise(squares, n_seeds - 1, sizes, noise) if (n_seeds > 1).any() else None,
    )
