"""Intervals, their quantiles, and the names of verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy import special

from explore.frontier.columns import Floats

NOT_RESOLVED: Final = "not resolved"
"""Verdict on a difference that noise could explain."""

POWER: Final = 0.8
"""Power: the probability of detecting a difference that counts as resolvable."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        level: share of such intervals that contain the true value.
    """

    estimate: float
    low: float
    high: float
    level: float

    @property
    def half_width(self) -> float:
        """Half of the distance between the ends."""
        return (self.high - self.low) / 2


def check_level(level: float) -> float:
    """Checks and returns a confidence level.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: must lie between 0 and 1, got {level!r}")
    return level


def t_quantile(dof: float, level: float) -> float:
    """Half-width of a two-sided t interval in standard errors."""
    return float(special.stdtrit(dof, (1 + check_level(level)) / 2))


def p_two_sided(difference: float, error: float, dof: float) -> float:
    """The p value of a t test of no difference, given its standard error."""
    if error <= 0:
        return float(difference == 0)
    return float(2 * special.stdtr(dof, -abs(difference) / error))


def p_equivalent(difference: float, error: float, dof: float, margin: float) -> float:
    """The p value of two one-sided t tests that a difference lies within `margin` on either side of zero.

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach, 1987.
    """
    gap = margin - abs(difference)
    if error <= 0:
        return float(gap <= 0)
    return float(special.stdtr(dof, -gap / error))


def resolvable(error: float, dof: float, level: float = 0.95, power: float = POWER) -> float:
    """The smallest difference that a two-sided t test detects with this power, given its standard error."""
    return (t_quantile(dof, level) + float(special.stdtrit(dof, power))) * error


def between(draws: Any, level: float, axis: int = 0) -> tuple[Any, Any]:
    """The central interval of draws, with equal tails."""
    tail = (1 - check_level(level)) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=axis)
    return low, high


def holm(p: Floats) -> Floats:
    """Adjusts p values so that the probability of rejecting any true hypothesis is at most the level.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
