"""Effects of arms with the same seeds, after removing the common effect of each seed.

Within a stratum, such as a size, the value of a run is the effect of its arm, plus that of its seed (of the order of
the data, which all arms share), plus noise. The noise is normal with one variance over the arms of a stratum;
`explore.frontier.noise` models how it changes between strata.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, known_rows
from explore.frontier.noise import Noise, NoiseKind, fit_noise


@dataclass(frozen=True)
class Stratum:
    """The arms of one stratum.

    Attributes:
        key: values of the columns that define the stratum.
        effects: effect of each arm, up to a common constant.
        covariance: covariance of the effects, divided by the variance of the noise.
        rows: number of the row in the table of known values, by arm and seed.
    """

    key: tuple[Hashable, ...]
    effects: dict[Hashable, float]
    covariance: Floats
    rows: dict[Hashable, dict[Hashable, int]]

    def difference(self, arm: Hashable, baseline: Hashable) -> tuple[float, float]:
        """Difference of two effects (arm minus baseline), and its variance divided by that of the noise."""
        contrast = np.array([float(each == arm) - float(each == baseline) for each in self.effects])
        variance = float(contrast @ self.covariance @ contrast)
        return self.effects[arm] - self.effects[baseline], variance


@dataclass(frozen=True)
class Paired:
    """All strata and their noise.

    Attributes:
        noise: noise of one run in each stratum, in order.
    """

    strata: tuple[Stratum, ...]
    noise: Noise

    def error(self, stratum: Stratum, variance: float) -> tuple[float, float]:
        """Standard error and degrees of freedom of a contrast within a stratum; `variance` is relative to the noise."""
        return self.noise.error([variance * (each is stratum) for each in self.strata])


def paired(
    table: pd.DataFrame, arm: str, strata: Sequence[str], pair: str, value: str, noise: NoiseKind = "auto"
) -> Paired:
    """Fits the effects of arms and seeds by least squares, stratum by stratum.

    If every arm has every seed, an effect is the mean of the arm, and a difference the mean of the paired differences.

    Args:
        noise: as in `fit_noise`; the size is the column of `strata` with positive numbers, if there is exactly one.

    Raises:
        ValueError: a column is missing, a run occurs twice, or there are too few runs to estimate the noise.
    """
    labels = [*strata, arm, pair]
    rows = known_rows(table, labels, value)
    if (twice := rows.duplicated(labels)).any():
        raise ValueError(f"table: two rows have the same {', '.join(labels)}: {tuple(rows.loc[twice, labels].iloc[0])}")
    fitted, squares, dof = [], [], []
    groups = rows.groupby(list(strata), sort=False, dropna=False) if strata else [((), rows)]
    for key, group in groups:
        arms, seeds = (pd.factorize(group[column]) for column in (arm, pair))
        design = np.hstack([np.eye(len(arms[1]))[arms[0]], np.eye(len(seeds[1]))[seeds[0]][:, 1:]])
        inverse = np.linalg.pinv(design.T @ design)
        values = group[value].to_numpy(dtype=np.float64)
        found = inverse @ (design.T @ values)
        squares.append(float(((values - design @ found) ** 2).sum()))
        dof.append(len(values) - int(np.linalg.matrix_rank(design)))
        n_arms = len(arms[1])
        fitted.append(
            Stratum(
                tuple(key),
                dict(zip(arms[1], found[:n_arms].tolist(), strict=True)),
                np.asarray(inverse[:n_arms, :n_arms], dtype=np.float64),
                {each: _places(group.loc[group[arm] == each, pair]) for each in arms[1]},
            )
        )
    if not any(dof):
        raise ValueError(f"table: too few runs to estimate the noise; two arms must share two of the same {pair}")
    sizes = _sizes(rows, strata, [each.key for each in fitted])
    return Paired(tuple(fitted), fit_noise(np.array(squares), np.array(dof, dtype=np.float64), sizes, noise))


def _places(column: pd.Series[Any]) -> dict[Hashable, int]:
    """Row numbers by value."""
    return dict(zip(column.tolist(), column.index.tolist(), strict=True))


def _sizes(rows: pd.DataFrame, strata: Sequence[str], keys: Sequence[tuple[Hashable, ...]]) -> Floats | None:
    """The sizes of strata if exactly one column has positive numbers, else None."""
    numeric = [
        i for i, column in enumerate(strata) if pd.api.types.is_numeric_dtype(rows[column]) and (rows[column] > 0).all()
    ]
    return np.array([key[numeric[0]] for key in keys], dtype=np.float64) if len(numeric) == 1 else None
