"""Saturating power laws of loss against training compute, a family each, with one irreducible loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, special

from explore.frontier.columns import Floats, known_rows
from explore.frontier.curves import bounds, curves, refit, slopes, starts
from explore.frontier.intervals import between

MIN_POINTS = 5
APART = 0.01
"""Decades of compute by which two points differ at least."""
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class PowerLaws:
    """L_f(C) = E + A_f (C / C_0)^-alpha_f for every family f.

    Attributes:
        compute_0: C_0, the geometric mean of all compute; A_f is the reducible loss of f there.
        irreducible: E, in the unit of the loss.
        amplitude: A_f by family.
        exponent: alpha_f by family.
        ranges: least and largest compute of each family's data.
        sd: standard deviation of one run around its law.
        dof: runs less parameters, and less the seeds but one.
        p_fit: p value that the means of points lie off the laws by noise alone; NaN where no point was repeated.
        draws: bootstrap draws (n, 1 + 2 families) of E, all A_f and all alpha_f.
    """

    compute_0: float
    irreducible: float
    amplitude: Mapping[str, float]
    exponent: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    sd: float
    dof: int
    p_fit: float
    draws: Floats = field(repr=False)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families."""
        return tuple(self.amplitude)

    def parameters(self, family: str) -> tuple[Floats, Floats, Floats]:
        """E, A and alpha of a family: the estimates first, then every bootstrap draw.

        Raises:
            ValueError: there is no such family.
        """
        if family not in self.amplitude:
            raise ValueError(f"family: {family!r} has no law; there are {', '.join(self.families)}")
        i, n = self.families.index(family), len(self.families)
        found = [self.irreducible, *self.amplitude.values(), *self.exponent.values()]
        both = np.vstack([found, self.draws])
        return both[:, 0], both[:, 1 + i], both[:, 1 + n + i]

    def in_range(self, family: str, compute: float) -> bool:
        """Whether the family was run below and above this compute."""
        low, high = self.ranges[family]
        return low * (1 - ROUNDING) <= compute <= high * (1 + ROUNDING)

    def predict(self, family: str, compute: npt.ArrayLike, level: float = 0.95) -> pd.DataFrame:
        """The law of a family, with the interval of the law (not of a further run).

        Args:
            compute: training FLOPs.

        Returns:
            Columns compute, loss, low, high and extrapolated.

        Raises:
            ValueError: there is no such family, or compute is not positive.
        """
        at = np.atleast_1d(np.asarray(compute, dtype=np.float64))
        if not (at > 0).all():
            raise ValueError(f"compute: must be positive, got {at.min():g}")
        e, a, alpha = self.parameters(family)
        losses = e[:, None] + a[:, None] * (at / self.compute_0) ** -alpha[:, None]
        low, high = between(losses[1:], level)
        outside = [not self.in_range(family, float(each)) for each in at]
        return pd.DataFrame({"compute": at, "loss": losses[0], "low": low, "high": high, "extrapolated": outside})

    def curves(self, n: int = 40, level: float = 0.95) -> pd.DataFrame:
        """All laws over the compute of their data: columns family, compute, loss, low and high, n rows a family."""
        parts = [
            self.predict(family, np.geomspace(*self.ranges[family], n), level).drop(columns="extrapolated")
            for family in self.families
        ]
        return pd.concat(parts, keys=self.families, names=["family", None]).reset_index("family", drop=False)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """The parameters: columns family (missing for the shared E), parameter, estimate, low and high."""
        rows: list[tuple[str | None, str, Floats]] = [(None, "E", self.parameters(self.families[0])[0])]
        for family in self.families:
            _, a, alpha = self.parameters(family)
            rows += [(family, "A", a), (family, "alpha", alpha)]
        records = [(*row[:2], row[2][0], *between(row[2][1:], level)) for row in rows]
        return pd.DataFrame(records, columns=["family", "parameter", "estimate", "low", "high"])


def fit_power_laws(
    table: pd.DataFrame,
    family: str = "family",
    compute: str = "flops_run",
    loss: str = "val_bpb",
    pair: str | None = "seed",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> PowerLaws:
    """Fits the laws by least squares of the loss, and again to data made of the laws and resampled residuals.

    Residuals are pooled over families and resampled one by one, larger by sqrt(n / (n - parameters)), and scaled by
    draws of what their standard deviation may be. What a seed does to all runs alike is taken out first, and comes back
    as a shift of all laws, t distributed with the seeds less one: with three seeds it widens the interval of a law and
    of E, and of no exponent or multiplier. `p_fit` says whether the laws fit; where they do not, no interval holds.

    Args:
        family: column that tells the laws apart.
        compute: column of training FLOPs.
        pair: column of the seed, which sets the order of the data; None takes all runs as independent.

    Raises:
        ValueError: a column is missing, compute or loss is not positive, or a family has too few points: five that
            differ in compute by 2% or more.

    Source: the form of arXiv 2203.15556, section 3.3, in compute instead of parameters and tokens.
    """
    rows = known_rows(table, [family] if pair is None else [family, pair], compute, loss)
    x, y = rows[compute].to_numpy(dtype=np.float64), rows[loss].to_numpy(dtype=np.float64)
    for column, numbers in ((compute, x), (loss, y)):
        if (numbers <= 0).any():
            raise ValueError(f"{column}: must be positive, got {numbers.min():g}")
    which, names = pd.factorize(rows[family].astype(str), sort=True)
    ranges = {}
    for i, name in enumerate(names):
        own = np.sort(np.log10(x[which == i]))
        if (n_points := 1 + int((np.diff(own) > APART).sum())) < MIN_POINTS:
            raise ValueError(f"{family}: {name!r} has {n_points} points of compute; at least {MIN_POINTS} are needed")
        ranges[str(name)] = (float(x[which == i].min()), float(x[which == i].max()))
    log_c = np.log(x) - np.log(x).mean()
    theta = _fit(which, log_c, y, starts(which, log_c, y))
    seeds = np.zeros(len(y), dtype=np.intp) if pair is None else pd.factorize(rows[pair])[0]
    moves, shares = _moves(y - curves(theta[None], which, log_c)[0], seeds)
    if len(moves) > 1:
        y = y - moves[seeds]
        theta = _fit(which, log_c, y, [theta])
    fitted = curves(theta[None], which, log_c)[0]
    residuals, dof = y - fitted, len(y) - len(theta) - len(moves) + 1
    sd = math.sqrt(float(residuals @ residuals) / dof)
    rng = np.random.default_rng(seed)
    scale = np.sqrt(len(y) / dof) * np.sqrt(dof / rng.chisquare(dof, size=(n_bootstrap, 1)))
    noise = rng.choice(residuals - residuals.mean(), size=(n_bootstrap, len(y))) * scale
    draws = np.exp(refit(theta, which, log_c, fitted + noise))
    if len(moves) > 1:
        error = math.sqrt(float(moves.var(ddof=1) * (shares @ shares)))
        draws[:, 0] += error * rng.standard_t(len(moves) - 1, size=n_bootstrap)
    values = np.exp(theta).tolist()
    n = len(names)
    return PowerLaws(
        float(np.exp(np.log(x).mean())),
        values[0],
        dict(zip(ranges, values[1 : 1 + n], strict=True)),
        dict(zip(ranges, values[1 + n :], strict=True)),
        ranges,
        sd,
        dof,
        _lack_of_fit(rows.assign(which=which, **{loss: y}), compute, loss, residuals, dof, len(moves) - 1),
        draws,
    )


def _fit(which: npt.NDArray[np.intp], log_c: Floats, y: Floats, starts: Iterable[Floats]) -> Floats:
    low, high = bounds(int(which.max()) + 1, float(y.min()))

    def missed(theta: Floats) -> Floats:
        return np.asarray(curves(theta[None], which, log_c)[0] - y)

    def jacobian(theta: Floats) -> Floats:
        return np.asarray(slopes(theta[None], which, log_c)[0])

    found: list[Any] = [
        optimize.least_squares(
            missed,
            np.clip(start, low + 1e-6, high - 1e-6),
            jac=jacobian,
            bounds=(low, high),
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        for start in starts
    ]
    return np.asarray(min(found, key=lambda fit: float(fit.cost)).x, dtype=np.float64)


def _moves(residuals: Floats, seeds: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """What each seed does to all runs alike, zero in the mean over runs, and its share of the runs."""
    counts = np.bincount(seeds)
    means = np.bincount(seeds, residuals) / counts
    return means - residuals.mean(), counts / len(seeds)


def _lack_of_fit(rows: pd.DataFrame, compute: str, loss: str, residuals: Floats, dof: int, n_moves: int) -> float:
    """The F test of what the means of points lie off the laws against the spread of their runs."""
    groups = rows.groupby(["which", compute])[loss]
    pure_dof = len(rows) - groups.ngroups - n_moves
    pure = float(((rows[loss] - groups.transform("mean")) ** 2).sum())
    if pure_dof <= 0 or pure <= 0 or dof <= pure_dof:
        return math.nan
    f = max(float(residuals @ residuals) - pure, 0.0) / (dof - pure_dof) / (pure / pure_dof)
    return float(special.fdtrc(dof - pure_dof, pure_dof, f))
