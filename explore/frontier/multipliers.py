"""Effective-compute multipliers and crossovers from fitted power laws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from explore.frontier.columns import Floats
from explore.frontier.intervals import check_level
from explore.frontier.laws import PowerLaws

BEYOND = 10.0
"""Factor of compute beyond the data within which a crossing is searched."""
MAX_LOG = 600.0


@dataclass(frozen=True)
class EffectiveCompute:
    """The factor of compute that a baseline needs to match a variant.

    Attributes:
        compute: training FLOPs of the variant.
        loss: loss of the variant at that compute.
        baseline_compute: training FLOPs after which the baseline has this loss.
        factor: `baseline_compute` / `compute`; above 1 the variant is better.
        low: lower end of the interval of `factor`.
        high: upper end of the interval of `factor`.
        extrapolated: whether either compute is outside the range of its family's runs.
        level: share of such intervals that contain the true factor.
    """

    variant: str
    baseline: str
    compute: float
    loss: float
    baseline_compute: float
    factor: float
    low: float
    high: float
    extrapolated: bool
    level: float


def effective_compute(
    laws: PowerLaws,
    variant: str,
    baseline: str,
    *,
    compute: float | None = None,
    loss: float | None = None,
    level: float = 0.95,
) -> EffectiveCompute:
    """Returns the effective-compute multiplier of a variant over a baseline, at a given compute or loss.

    The irreducible loss is shared, so the multiplier at a given compute does not depend on it:
    C_0 (A_b / R)^(1 / alpha_b) / C, where R is the variant's reducible loss at C.

    Args:
        compute: training FLOPs of the variant.
        loss: loss in the unit of the fit; give either this or `compute`.

    Raises:
        ValueError: a family has no law, not exactly one of `compute` and `loss` is given, or a law never reaches the
            loss.
    """
    check_level(level)
    if (compute is None) == (loss is None):
        raise ValueError(f"compute, loss: exactly one must be given, got {compute!r} and {loss!r}")
    (e, a_v, alpha_v), (_, a_b, alpha_b) = laws.parameters(variant), laws.parameters(baseline)
    if compute is not None:
        if not (math.isfinite(compute) and compute > 0):
            raise ValueError(f"compute: must be positive, got {compute!r}")
        log_c = np.full(len(e), math.log(compute / laws.compute_0))
        log_reducible = np.log(a_v) - alpha_v * log_c
    else:
        assert loss is not None
        if not loss > laws.irreducible:
            raise ValueError(f"loss: {loss!r} is never reached; the irreducible loss is {laws.irreducible:g}")
        with np.errstate(divide="ignore", invalid="ignore"):
            log_reducible = np.where(loss > e, np.log(np.maximum(loss - e, 0)), -np.inf)
        log_c = (np.log(a_v) - log_reducible) / alpha_v
    with np.errstate(invalid="ignore"):
        log_b = (np.log(a_b) - log_reducible) / alpha_b
        log_factor = log_b - log_c
    log_factor[np.isnan(log_factor)] = math.inf  # a draw in which neither law reaches the loss
    own, other = (laws.compute_0 * _exp(each[0]) for each in (log_c, log_b))
    low, high = _quantiles(log_factor[1:], level)
    return EffectiveCompute(
        variant,
        baseline,
        own,
        laws.irreducible + math.exp(log_reducible[0]),
        other,
        _exp(log_factor[0]),
        _exp(low),
        _exp(high),
        not (laws.in_range(variant, own) and laws.in_range(baseline, other)),
        level,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < MAX_LOG else math.inf


def _quantiles(draws: Floats, level: float) -> tuple[float, float]:
    """Quantiles without interpolation, since draws may be infinite."""
    tail = (1 - level) / 2
    low = np.quantile(draws, tail, method="lower")
    return float(low), float(np.quantile(draws, 1 - tail, method="higher"))


@dataclass(frozen=True)
class Crossover:
    """The compute at which the better of two families changes.

    Attributes:
        compute: training FLOPs at which the laws cross; NaN if they do not cross within the tenfold range.
        low: lowest compute at which it is not resolved which family is better; 0 if below the tenfold range.
        high: highest such compute; infinite if above the tenfold range. Both are NaN if all is resolved.
        better_below: the better family at the lower end of the range, by the estimates.
        better_above: the better family at the upper end of the range.
        p_in_range: probability that the laws cross within the range.
        p_in_tenfold: probability that they cross within the tenfold range.
        range: range of compute in which both families were run; the tenfold range adds a factor of ten at both ends.
        level: share of such intervals that contain the true crossing, if it is within the tenfold range.
    """

    a: str
    b: str
    compute: float
    low: float
    high: float
    better_below: str
    better_above: str
    p_in_range: float
    p_in_tenfold: float
    range: tuple[float, float]
    level: float

    @property
    def extrapolated(self) -> bool:
        """Whether the crossing is outside the data of either family."""
        return not self.range[0] <= self.compute <= self.range[1]


def crossover(laws: PowerLaws, a: str, b: str, level: float = 0.95, n_grid: int = 801) -> Crossover:
    """Finds the compute at which two laws cross; the second half of the flip detector.

    The interval is the set of computes at which the bootstrap does not resolve which law is lower, like Fieller's for a
    ratio: it is unbounded if the exponents may be equal, which an interval from draws of the crossing would hide.

    Raises:
        ValueError: a family has no law, both are the same, or their ranges of compute do not overlap.
    """
    check_level(level)
    if a == b:
        raise ValueError(f"a, b: must be two different families, got {a!r} twice")
    (_, a_a, alpha_a), (_, a_b, alpha_b) = laws.parameters(a), laws.parameters(b)
    start = max(laws.ranges[family][0] for family in (a, b))
    end = min(laws.ranges[family][1] for family in (a, b))
    if start >= end:
        raise ValueError(f"{a}, {b}: the compute of their runs does not overlap; the ranges must")
    gap, slope = np.log(a_a) - np.log(a_b), alpha_a - alpha_b
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = np.log(laws.compute_0) + gap / slope
    inner, outer = np.log([start, end]), np.log([start / BEYOND, end * BEYOND])
    grid = np.linspace(outer[0], outer[1], n_grid)
    above = np.array([(gap[1:] > slope[1:] * (log_c - math.log(laws.compute_0))).mean() for log_c in grid])
    tail = (1 - level) / 2
    open_at = np.flatnonzero((above > tail) & (above < 1 - tail))
    low = high = math.nan
    if len(open_at):
        low = 0.0 if open_at[0] == 0 else float(np.exp(grid[open_at[0] - 1]))
        high = math.inf if open_at[-1] == n_grid - 1 else float(np.exp(grid[open_at[-1] + 1]))
    signs = gap[0] - slope[0] * (inner - math.log(laws.compute_0))
    found = float(crossing[0])
    return Crossover(
        a,
        b,
        math.exp(found) if outer[0] <= found <= outer[1] else math.nan,
        low,
        high,
        b if signs[0] > 0 else a,
        b if signs[1] > 0 else a,
        float(((crossing[1:] >= inner[0]) & (crossing[1:] <= inner[1])).mean()),
        float(((crossing[1:] >= outer[0]) & (crossing[1:] <= outer[1])).mean()),
        (start, end),
        level,
    )
