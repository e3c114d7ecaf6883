"""Saturating power laws of loss against training compute, one per family, with a shared irreducible loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, special

from explore.frontier.columns import Floats, known_rows
from explore.frontier.curves import bounds, curves, refit, slopes, starts
from explore.frontier.intervals import Interval, between
from explore.frontier.noise import fit_noise

MIN_POINTS = 5
APART = 0.01
"""Minimum distance in decades of compute between two points."""
ROUNDING = 1e-9
NOISE_DOF = 16
"""Residual degrees of freedom from which on the noise may change with compute; fewer would fit it to chance."""
REWEIGHTED = 3
"""Rounds of reweighting runs by the noise found in the previous fit."""
WEBB = np.sqrt([0.5, 1.0, 1.5]) * np.array([[1.0], [-1.0]])
"""Six-point distribution of factors, for resampling few trunks. Source: Webb, Reworking wild bootstrap, 2023."""


@dataclass(frozen=True, eq=False)
class PowerLaws:
    """L_f(C) = E + A_f (C / C_0)^-alpha_f for every family f.

    Attributes:
        compute_0: C_0, the geometric mean of all compute; A_f is the reducible loss of f there.
        irreducible: E, in the unit of the loss.
        amplitude: A_f by family.
        exponent: alpha_f by family.
        ranges: lowest and highest compute of each family's data.
        sd: standard deviation of one run around its law, at C_0.
        sd_exponent: d log sd / d log C; 0 if the noise was assumed equal everywhere.
        dof: runs minus parameters, minus seeds, plus 1.
        p_fit: p value of the hypothesis that the means of points deviate from the laws by noise alone; NaN without
        repeats.
        draws: bootstrap draws (n, 1 + 2 families) of E, all A_f and all alpha_f.
    """

    compute_0: float
    irreducible: float
    amplitude: Mapping[str, float]
    exponent: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    sd: float
    sd_exponent: float
    dof: int
    p_fit: float
    draws: Floats = field(repr=False)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families."""
        return tuple(self.amplitude)

    def parameters(self, family: str) -> tuple[Floats, Floats, Floats]:
        """E, A and alpha of a family: the estimates, then every bootstrap draw.

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
        """Whether this compute is within the range of the family's runs."""
        low, high = self.ranges[family]
        return low * (1 - ROUNDING) <= compute <= high * (1 + ROUNDING)

    def predict(self, family: str, compute: npt.ArrayLike, level: float = 0.95) -> pd.DataFrame:
        """Evaluates the law of a family, with the interval of the law (not of a new run).

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
        """All laws over the compute of their data: columns family, compute, loss, low and high; n rows per family."""
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
    *,
    shared_exponent: bool = False,
    noise: Literal["power", "pooled"] = "power",
    trunk: str | None = None,
) -> PowerLaws:
    """Fits the laws by least squares of the loss, and bootstraps them with resampled residuals.

    The standard deviation of a run is a power of its compute, where 16 residual degrees of freedom or more can show it:
    runs are weighted by the inverse variance, and residuals are divided by it before resampling. They are resampled
    individually, scaled up by sqrt(n / (n - parameters)) and by draws of their uncertain standard deviation. Runs that
    branched from one trunk share its noise; with `trunk`, the
    residuals of a trunk stay together and get one random factor. The common effect of a seed on all runs is removed
    first and added back as a shift of all laws, t distributed with seeds - 1 degrees of freedom: it widens the
    intervals of laws and of E, but not of exponents or multipliers. `p_fit` tests whether the laws fit; if they do not,
    the intervals are not valid.

    Args:
        family: column of the family.
        compute: column of training FLOPs.
        pair: column of the seed, which sets the order of the data; None treats all runs as independent.
        shared_exponent: whether all families share one exponent, so that their laws differ only by a factor on the
            reducible loss.
        noise: `power`, or `pooled` for one standard deviation everywhere.
        trunk: column of the trunk from which a run branched, such as that of its seed; families do not share trunks.

    Raises:
        ValueError: a column is missing, compute or loss is not positive, a family has too few points (five that
            differ in compute by 2% or more) or a single trunk, or Bartlett's test rejects `pooled`.

    Source: the form of arXiv 2203.15556, section 3.3, in compute instead of parameters and tokens; trunks as in the
    wild cluster bootstrap of Cameron, Gelbach and Miller, 2008.
    """
    labels = [family, *([] if pair is None else [pair]), *([] if trunk is None else [trunk])]
    rows = known_rows(table, list(dict.fromkeys(labels)), compute, loss)
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
    if noise == "pooled":
        _check_equal(rows, family, compute, loss)
    theta = _fit(which, log_c, y, starts(which, log_c, y, shared=shared_exponent))
    seeds = np.zeros(len(y), dtype=np.intp) if pair is None else pd.factorize(rows[pair])[0]
    dof = len(y) - len(theta) - int(seeds.max())
    measured, sd_exponent, scale = y, 0.0, np.ones(len(y))
    moves, shares = _moves(measured - curves(theta[None], which, log_c)[0], seeds, scale)
    for _ in range(REWEIGHTED):
        y = measured - moves[seeds]
        theta = _fit(which, log_c, y, [theta], scale)
        if noise == "power" and dof >= NOISE_DOF:
            sd_exponent = _sd_exponent(y - curves(theta[None], which, log_c)[0], log_c, dof)
            scale = np.exp(sd_exponent * log_c)
        moves, shares = _moves(measured - curves(theta[None], which, log_c)[0], seeds, scale)
    y = measured - moves[seeds]
    theta = _fit(which, log_c, y, [theta], scale)
    fitted = curves(theta[None], which, log_c)[0]
    residuals = (y - fitted) / scale
    rng = np.random.default_rng(seed)
    if trunk is None:
        factor = np.sqrt(len(y) / dof) * np.sqrt(dof / rng.chisquare(dof, size=(n_bootstrap, 1)))
        drawn = rng.choice(residuals - residuals.mean(), size=(n_bootstrap, len(y))) * factor
    else:
        drawn = residuals * _trunk_factors(rows, family, trunk, n_bootstrap, rng)
    draws = np.exp(refit(theta, which, log_c, fitted + drawn * scale, scale))
    if len(moves) > 1:
        error = math.sqrt(float(moves.var(ddof=1) * (shares @ shares)))
        draws[:, 0] += error * rng.standard_t(len(moves) - 1, size=n_bootstrap)
    values, n = np.exp(theta), len(names)
    if shared_exponent:
        values, draws = (
            np.append(each[..., : 1 + n], np.repeat(each[..., -1:], n, -1), -1) for each in (values, draws)
        )
    found = values.tolist()
    return PowerLaws(
        float(np.exp(np.log(x).mean())),
        found[0],
        dict(zip(ranges, found[1 : 1 + n], strict=True)),
        dict(zip(ranges, found[1 + n :], strict=True)),
        ranges,
        math.sqrt(float(residuals @ residuals) / dof),
        sd_exponent,
        dof,
        _lack_of_fit(rows.assign(which=which, off=residuals), compute, dof, len(moves) - 1),
        draws,
    )


def reducible_ratio(laws: PowerLaws, variant: str, baseline: str, level: float = 0.95) -> Interval:
    """Reducible loss of a variant divided by a baseline's at the same compute, by laws with a shared exponent.

    Below 1 the variant is better. The ratio is the same at every compute.

    Raises:
        ValueError: a family has no law, or the exponents differ.
    """
    (_, a_v, alpha_v), (_, a_b, alpha_b) = laws.parameters(variant), laws.parameters(baseline)
    if not np.array_equal(alpha_v, alpha_b):
        raise ValueError("laws must have a shared exponent, as fit_power_laws(..., shared_exponent=True) gives them")
    ratio = a_v / a_b
    low, high = between(ratio[1:], level)
    return Interval(float(ratio[0]), float(low), float(high), level)


def _check_equal(rows: pd.DataFrame, family: str, compute: str, loss: str) -> None:
    groups = rows.groupby([family, compute])[loss]
    dof = groups.size().to_numpy(dtype=np.float64) - 1
    if (dof > 0).any():
        squares = np.asarray(groups.var(ddof=0).to_numpy(dtype=np.float64) * (dof + 1), dtype=np.float64)
        fit_noise(squares, np.asarray(dof, dtype=np.float64), kind="pooled")


def _sd_exponent(residuals: Floats, log_c: Floats, dof: int) -> float:
    """Exponent of the noise in compute, from residuals with `dof` degrees of freedom in total."""
    if not (residuals**2).sum() or len(np.unique(log_c)) < 2:
        return 0.0
    share = np.full(len(residuals), dof / len(residuals))
    return fit_noise(residuals**2, share, np.exp(log_c), "power").exponent


def _trunk_factors(rows: pd.DataFrame, family: str, trunk: str, n: int, rng: np.random.Generator) -> Floats:
    """Random factors (n, runs) of residuals, one per trunk, scaled up for the fit to few trunks."""
    trunks = rows.groupby([family, trunk], sort=False).ngroup().to_numpy()
    per_family = rows.groupby(family)[trunk].transform("nunique").to_numpy(dtype=np.float64)
    if (per_family < 2).any():
        alone = rows.loc[per_family < 2, family].iloc[0]
        raise ValueError(f"{trunk}: {alone!r} must have at least two trunks, got one")
    dof = len(np.unique(trunks)) - rows[family].nunique()
    signs = rng.choice(WEBB.ravel(), size=(n, int(trunks.max()) + 1))[:, trunks]
    chance = np.sqrt(dof / rng.chisquare(dof, size=(n, 1)))
    return np.asarray(signs * np.sqrt(per_family / (per_family - 1)) * chance, dtype=np.float64)


def _fit(
    which: npt.NDArray[np.intp], log_c: Floats, y: Floats, starts: Iterable[Floats], scale: Floats | None = None
) -> Floats:
    n, over = int(which.max()) + 1, np.ones(len(y)) if scale is None else scale

    def missed(theta: Floats) -> Floats:
        return np.asarray((curves(theta[None], which, log_c)[0] - y) / over)

    def jacobian(theta: Floats) -> Floats:
        return np.asarray(slopes(theta[None], which, log_c)[0] / over[:, None])

    def fitted(start: Floats) -> Any:
        low, high = bounds(n, float(y.min()), len(start) - 1 - n)
        start = np.clip(start, low + 1e-6, high - 1e-6)
        tolerances: dict[str, Any] = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12)
        return optimize.least_squares(missed, start, jac=jacobian, bounds=(low, high), x_scale="jac", **tolerances)

    return np.asarray(min(map(fitted, starts), key=lambda fit: float(fit.cost)).x, dtype=np.float64)


def _moves(residuals: Floats, seeds: npt.NDArray[np.intp], scale: Floats) -> tuple[Floats, Floats]:
    """The common effect of each seed on its runs (weighted mean zero over all runs), and its share of the weight."""
    counts = np.bincount(seeds, scale**-2.0)
    means, shares = np.bincount(seeds, residuals * scale**-2.0) / counts, counts / counts.sum()
    return means - means @ shares, shares


def _lack_of_fit(rows: pd.DataFrame, compute: str, dof: int, n_moves: int) -> float:
    """The p value of an F test: deviation of point means from the laws against the spread of their runs."""
    groups, total = rows.groupby(["which", compute])["off"], float((rows["off"] ** 2).sum())
    pure_dof = len(rows) - groups.ngroups - n_moves
    pure = float(((rows["off"] - groups.transform("mean")) ** 2).sum())
    if pure_dof <= 0 or pure <= 0 or dof <= pure_dof:
        return math.nan
    f = max(total - pure, 0.0) / (dof - pure_dof) / (pure / pure_dof)
    return float(special.fdtrc(dof - pure_dof, pure_dof, f))
