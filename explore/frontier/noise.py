"""The noise of one run at each size: a power law over sizes, one variance per size, or one for all if a test allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from explore.frontier.columns import Floats

NoiseKind = Literal["auto", "own", "power", "pooled"]

REJECTED: Final = 0.05
"""p value below which a hypothesis about variances is rejected."""
MIN_DOF: Final = 4
"""Minimum degrees of freedom for a separate variance at each of two sizes."""
ITERATIONS: Final = 100


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard deviation of one run at several points, with its uncertainty.

    Attributes:
        kind: `power`: the variance is a power of the size; `own`: each point has its own; `pooled`: one for all.
        sd: standard deviation of one run at each point; NaN if unknown.
        covariance: covariance (points, points) of the logarithms of the variances, divided by 2; the inverse of its
            diagonal gives the degrees of freedom.
        bartlett_p: p value of the hypothesis that all variances are equal; NaN if only one point was repeated.
        exponent: d log sd / d log size of `power`; NaN for other kinds.
    """

    kind: str
    sd: Floats
    covariance: Floats
    bartlett_p: float
    exponent: float

    @property
    def dof(self) -> Floats:
        """Degrees of freedom of each standard deviation; fractional ones follow Satterthwaite's rule."""
        return np.asarray(1 / np.diag(self.covariance))

    def error(self, weights: npt.ArrayLike) -> tuple[float, float]:
        """Standard error of an estimate whose variance is `weights @ sd**2`, and its degrees of freedom.

        Source: Satterthwaite, An approximate distribution of estimates of variance components, 1946.
        """
        weights = np.asarray(weights, dtype=np.float64)
        used = weights > 0
        parts = weights[used] * self.sd[used] ** 2
        total = float(parts.sum())
        covariance = self.covariance[np.ix_(used, used)]
        if total == 0:
            return 0.0, float(1 / np.diag(covariance).max())
        return math.sqrt(total), total**2 / float(parts @ covariance @ parts)

    def take(self, points: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Noise:
        """The noise at a subset of the points."""
        return Noise(self.kind, self.sd[points], self.covariance[points][:, points], self.bartlett_p, self.exponent)

    def draws(self, n: int, n_seeds: Floats, rng: np.random.Generator) -> Floats:
        """Draws errors (n, points) of the means over seeds, including the uncertainty of their standard deviations.

        Each is t distributed; estimated variances are correlated if they come from one law.
        """
        scale = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(correlation)
        root = vectors * np.sqrt(np.maximum(values, 0))
        quantiles = special.ndtr(rng.standard_normal((n, len(scale))) @ root.T)
        chi2 = 2 * special.gammaincinv(self.dof / 2, np.clip(quantiles, 1e-12, 1 - 1e-12))
        draws = rng.standard_normal((n, len(scale))) / np.sqrt(n_seeds) * np.sqrt(self.dof / chi2)
        return np.asarray(self.sd * draws, dtype=np.float64)


def fit_noise(squares: Floats, dof: Floats, sizes: Floats | None = None, kind: NoiseKind = "auto") -> Noise:
    """Estimates the noise of one run at each point from the spread of its repeats.

    With three or more sizes, `auto` takes a power law, or one variance per point if a test rejects the law. With fewer
    sizes each point has its own variance if it has at least four degrees of freedom; otherwise all share one, unless
    Bartlett's test rejects equal variances.

    Args:
        squares: sum of squared residuals of each point.
        dof: degrees of freedom of each point; 0 without repeats.
        sizes: a positive size for each point, such as its width or its training FLOPs.

    Raises:
        ValueError: nothing was repeated, or `kind` does not fit: no sizes for `power`, a point without repeats for
            `own`, or variances for `pooled` whose equality Bartlett's test rejects.
    """
    if not dof.sum():
        raise ValueError("noise: no point has two runs; at least one point must have several seeds")
    p = bartlett(squares, dof)
    known = sizes is not None and bool((sizes > 0).all())
    n_sizes = len(np.unique(sizes[dof > 0])) if sizes is not None and known else 0
    if kind == "auto":
        if n_sizes >= 3:
            assert sizes is not None
            power = _power(squares, dof, sizes, p)
            fits = _misfit(power.sd, squares, dof) >= REJECTED
            return power if fits or (dof == 0).any() else _own(squares, dof, p)
        own = (dof >= MIN_DOF).all() or (p < REJECTED and (dof > 0).all())
        return _own(squares, dof, p) if own else _pooled(squares, dof, p)
    if kind == "power":
        if n_sizes < 2:
            raise ValueError("noise: 'power' needs a column of positive sizes, with repeats at two of them or more")
        assert sizes is not None
        return _power(squares, dof, sizes, p)
    if kind == "own":
        if (dof == 0).any():
            raise ValueError("noise: 'own' needs repeats at every point; at least one point has a single run")
        return _own(squares, dof, p)
    if p < REJECTED:
        raise ValueError(f"noise: must not be 'pooled', as Bartlett's test rejects equal variances (p = {p:.2g})")
    return _pooled(squares, dof, p)


def bartlett(squares: Floats, dof: Floats) -> float:
    """The p value of Bartlett's test of equal variances; NaN if fewer than two points were repeated.

    Source: Bartlett, Properties of sufficiency and statistical tests, 1937.
    """
    squares, dof = squares[dof > 0], dof[dof > 0]
    if len(dof) < 2 or not squares.sum():
        return math.nan
    if (squares == 0).any():
        return 0.0
    total = dof.sum()
    statistic = total * math.log(squares.sum() / total) - float(dof @ np.log(squares / dof))
    correction = 1 + (float((1 / dof).sum()) - 1 / total) / (3 * (len(dof) - 1))
    return float(special.chdtrc(len(dof) - 1, statistic / correction))


def _own(squares: Floats, dof: Floats, p: float) -> Noise:
    with np.errstate(divide="ignore", invalid="ignore"):
        return Noise("own", np.sqrt(squares / dof), np.diag(1 / dof), p, math.nan)


def _pooled(squares: Floats, dof: Floats, p: float) -> Noise:
    n, total = len(dof), dof.sum()
    sd = np.full(n, math.sqrt(squares.sum() / total))
    return Noise("pooled", sd, np.full((n, n), 1 / total), p, math.nan)


def _power(squares: Floats, dof: Floats, sizes: Floats, p: float) -> Noise:
    """Maximum likelihood of log variance = a + b log size, by Fisher scoring, whose information is dof / 2."""
    log_size = np.log(sizes)
    design = np.column_stack([np.ones(len(dof)), log_size - np.average(log_size, weights=dof)])
    used = dof > 0
    inverse = np.linalg.inv(design[used].T @ (dof[used, None] * design[used]))
    covariance = design @ inverse @ design.T
    if not squares.sum():
        return Noise("power", np.zeros(len(dof)), covariance, p, math.nan)
    variances = squares[used] / dof[used]
    beta = np.array([math.log(squares.sum() / dof.sum()), 0.0])
    for _ in range(ITERATIONS):
        fitted = np.exp(design[used] @ beta)
        step = inverse @ (design[used].T @ (dof[used] * (variances / fitted - 1)))
        beta = beta + np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    return Noise("power", np.exp(design @ beta / 2), covariance, p, float(beta[1] / 2))


def _misfit(sd: Floats, squares: Floats, dof: Floats) -> float:
    """The p value of a deviance test that the variances follow their power law."""
    used = (dof > 0) & (sd > 0)
    ratio = squares[used] / dof[used] / sd[used] ** 2
    if used.sum() < 3:
        return 1.0
    if (ratio == 0).any():
        return 0.0
    deviance = float(dof[used] @ (ratio - 1 - np.log(ratio)))
    return float(special.chdtrc(used.sum() - 2, deviance))
