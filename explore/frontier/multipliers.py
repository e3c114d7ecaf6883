"""What a variant is worth in compute, and where two laws cross, as fitted power laws tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from explore.frontier.columns import Floats
from explore.frontier.intervals import check_level
from explore.frontier.laws import PowerLaws

BEYOND = 10.0
"""How far outside of the data a crossing is looked for, as a factor of compute."""
MAX_LOG = 600.0


@dataclass(frozen=True)
class EffectiveCompute:
    """By how much more a baseline must be trained to be as good as a variant.

    Attributes:
        compute: training FLOPs of the variant.
        loss: loss of the variant there.
        baseline_compute: training FLOPs after which the baseline has this loss.
        factor: `baseline_compute` over `compute`; more than 1 says that the variant is better.
        low: lower end of the interval of `factor`.
        high: upper end of it.
        extrapolated: whether either compute lies outside of the runs of its family.
        level: share of such intervals that hold the true factor.
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
    """The effective-compute multiplier of a variant over a baseline, at a compute of the variant or at a loss.

    The irreducible loss is common to both, so the multiplier at a compute needs none of it:
    C_0 (A_b / R)^(1 / alpha_b) / C, where R is the variant's reducible loss at C.

    Args:
        compute: training FLOPs of the variant.
        loss: in the unit of the fit; either this or `compute` is given.

    Raises:
        ValueError: a family has no law, both or none of `compute` and `loss` are given, or one that no law reaches.
    """
    check_level(level)
    if (compute is None) == (loss is None):
        raise ValueError(f"compute, loss: one of both must be given, got {compute!r} and {loss!r}")
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
    log_factor[np.isnan(log_factor)] = math.inf  # a draw that never reaches the loss, with either
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
    """Quantiles that are draws themselves, as infinite ones cannot be interpolated."""
    tail = (1 - level) / 2
    low = np.quantile(draws, tail, method="lower")
    return float(low), float(np.quantile(draws, 1 - tail, method="higher"))


@dataclass(frozen=True)
class Crossover:
    """Where the better of two families changes.

    Attributes:
        compute: training FLOPs at which the laws cross; NaN where that is nowhere within the range times ten.
        low: least compute at which it is not resolved which is better; 0 where that begins below the range over ten.
        high: largest such compute; infinite where it ends beyond the range times ten. Both NaN: resolved everywhere.
        better_below: the family that is better at the lower end of the range, by the estimates.
        better_above: the one at the upper end.
        p_in_range: probability that the laws cross within the compute at which both families were run.
        p_in_tenfold: the same of a range ten times as far in both directions.
        range: compute at which both families were run.
        level: share of such intervals that hold the true crossing, if it lies within the range times ten.
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
        """Whether the crossing lies outside of the data of either family."""
        return not self.range[0] <= self.compute <= self.range[1]


def crossover(laws: PowerLaws, a: str, b: str, level: float = 0.95, n_grid: int = 801) -> Crossover:
    """The compute at which two laws cross; the second half of the flip detector.

    The interval is the set of computes at which the bootstrap does not resolve which law is lower, as Fieller's is for
    a ratio: it can be open where the exponents may be equal, which an interval from draws of the crossing hides.

    Raises:
        ValueError: a family has no law, both are one, or no compute lies within the data of both.
    """
    check_level(level)
    if a == b:
        raise ValueError(f"a, b: {a!r} does not cross itself; two families are needed")
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
