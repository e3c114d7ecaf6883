"""Saturating power laws as functions of their parameters, and their least-squares fit to many data sets at once.

Parameters are kept as logarithms, theta = log (E, A_1, ..., A_F, alpha_1, ..., alpha_F), so all are positive; with a
shared exponent there is one alpha. `which` is the family of each run and `log_c` the logarithm of its compute divided
by the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from explore.frontier.columns import Floats

Families = npt.NDArray[np.intp]

MIN_E, MAX_A, MIN_ALPHA, MAX_ALPHA = 1e-6, 1e3, 1e-3, 5.0
ITERATIONS = 200


def bounds(n_families: int, least: float, n_exponents: int | None = None) -> tuple[Floats, Floats]:
    """Bounds of theta, given the lowest loss `least`: E is between 1e-6 and 1 times that."""
    ones, exponents = np.ones(n_families), np.ones(n_exponents or n_families)
    low = np.concatenate([[MIN_E * least], MIN_E * least * ones, MIN_ALPHA * exponents])
    high = np.concatenate([[least], MAX_A * least * ones, MAX_ALPHA * exponents])
    return np.log(low), np.log(high)


def curves(theta: Floats, which: Families, log_c: Floats) -> Floats:
    """Losses (fits, runs) of parameters (fits, 1 + 2 families), or (fits, 2 + families) with a shared exponent."""
    return np.asarray(np.exp(theta[:, :1]) + _reducible(theta, which, log_c), dtype=np.float64)


def _exponents(theta: Floats, which: Families) -> Families:
    """The index in theta of each run's exponent."""
    n = int(which.max()) + 1
    return np.asarray(1 + n + (which if theta.shape[1] == 1 + 2 * n else np.zeros_like(which)))


def _reducible(theta: Floats, which: Families, log_c: Floats) -> Floats:
    exponents = np.exp(theta[:, _exponents(theta, which)])
    return np.asarray(np.exp(theta[:, 1 + which] - exponents * log_c), dtype=np.float64)


def slopes(theta: Floats, which: Families, log_c: Floats) -> Floats:
    """Derivatives (fits, runs, parameters) of `curves`."""
    places, runs = _exponents(theta, which), np.arange(len(log_c))
    reducible = _reducible(theta, which, log_c)
    found = np.zeros((*reducible.shape, theta.shape[1]))
    found[:, :, 0] = np.exp(theta[:, :1])
    found[:, runs, 1 + which] = reducible
    found[:, runs, places] = -reducible * np.exp(theta[:, places]) * log_c
    return found


def starts(which: Families, log_c: Floats, y: Floats, *, shared: bool = False) -> Iterator[Floats]:
    """Initial parameters of a fit: for several E, straight lines through the logarithm of the loss above E."""
    for share in (0.05, 0.4, 0.7, 0.9, 0.98):
        e = share * float(y.min())
        lines = [np.polyfit(log_c[which == i], np.log(y[which == i] - e), 1) for i in range(int(which.max()) + 1)]
        slope, intercept = np.array(lines).T
        slope = slope.mean(keepdims=True) if shared else slope
        yield np.concatenate([[np.log(e)], intercept, np.log(np.clip(-slope, 10 * MIN_ALPHA, MAX_ALPHA))])


def refit(start: Floats, which: Families, log_c: Floats, y: Floats, scale: Floats | None = None) -> Floats:
    """Fits every row of `y` (fits, runs) by the Levenberg-Marquardt method, all from the same start.

    Args:
        scale: relative noise of each run; None means equal.

    Returns:
        Parameters, one row per fit in the form of `start`.
    """
    scale = np.ones(len(log_c)) if scale is None else scale
    n = int(which.max()) + 1
    low, high = bounds(n, float(y.min()), len(start) - 1 - n)
    low, high = np.minimum(low, start), np.maximum(high, start)
    theta = np.repeat(start[None], len(y), axis=0)
    damping = np.full(len(y), 1e-3)
    errors = (y - curves(theta, which, log_c)) / scale
    cost = (errors**2).sum(axis=1)
    todo = np.arange(len(y))
    for _ in range(ITERATIONS):
        if not len(todo):
            break
        slope = slopes(theta[todo], which, log_c) / scale[:, None]
        square = np.swapaxes(slope, 1, 2) @ slope
        gradient = (np.swapaxes(slope, 1, 2) @ errors[todo, :, None])[:, :, 0]
        diagonal = np.einsum("fpp->fp", square)
        damped = damping[todo, None] * np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True))
        np.einsum("fpp->fp", square)[:] += damped
        step = np.clip(np.linalg.solve(square, gradient[:, :, None])[:, :, 0], -1.0, 1.0)
        tried = np.clip(theta[todo] + step, low, high)
        missed = (y[todo] - curves(tried, which, log_c)) / scale
        found = (missed**2).sum(axis=1)
        gain = cost[todo] - found
        better = todo[gain > 0]
        theta[better], errors[better], cost[better] = tried[gain > 0], missed[gain > 0], found[gain > 0]
        damping[todo] = np.clip(damping[todo] * np.where(gain > 0, 0.2, 5.0), 1e-12, 1e12)
        done = np.where(gain > 0, gain <= 1e-10 * cost[todo], damping[todo] >= 1e8)
        todo = todo[~done]
    return theta
