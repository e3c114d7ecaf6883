"""The flip detector: does the ranking of arms at one size survive at another?"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from explore.frontier.intervals import check_level, holm, p_two_sided
from explore.frontier.paired import Paired, Stratum, paired

Bools = npt.NDArray[np.bool_]

MIN_ARMS = 3


def rank_correlation(
    table: pd.DataFrame, arm: str, size: str, error: str = "val_bpb", pair: str = "seed", level: float = 0.95
) -> pd.DataFrame:
    """Kendall's tau between the rankings of arms at every two sizes, and the shares of pairs of arms that flip.

    Noise in both rankings biases tau towards 0, and a bootstrap, which adds noise again, biases it further: for arms
    that are close, its interval often misses the tau of the true effects. So the interval here is the range of tau if
    every pair of arms whose order is not resolved may go either way: from 2 holds - 1 to 1 - 2 flips. It is wide if
    little is resolved, and contains the true tau with a probability of at least `level`. An order is resolved if both
    differences are; its p value is the larger of the two, and Holm's correction is over all pairs of arms at a pair of
    sizes.

    Args:
        arm: column that names the arms; arms present at both sizes are ranked.
        size: column of the sizes.
        pair: column of the seed, which sets the order of the data.

    Returns:
        One row per pair of sizes, in order of size: size_a, size_b, n_arms, tau (of the estimated effects), low, high,
        flipped (share of pairs of arms whose order differs), and flips and holds (shares of pairs resolved to flip or
        to keep their order).

    Raises:
        ValueError: a column is missing, a run occurs twice, or two sizes have fewer than three arms in common.
    """
    from scipy import stats

    check_level(level)
    fit = paired(table, arm, [size], pair, error)
    rows = []
    for one, other, arms in _size_pairs(fit, size):
        sizes = (one.key[0], other.key[0])
        tau = stats.kendalltau([one.effects[each] for each in arms], [other.effects[each] for each in arms]).statistic
        flipped, resolved = _order_changes(fit, one, other, arms, level)
        flips, holds = float((flipped & resolved).mean()), float((~flipped & resolved).mean())
        rows.append((*sizes, len(arms), float(tau), 2 * holds - 1, 1 - 2 * flips, float(flipped.mean()), flips, holds))
    columns = ["size_a", "size_b", "n_arms", "tau", "low", "high", "flipped", "flips", "holds"]
    return pd.DataFrame(rows, columns=columns)


def _order_changes(
    fit: Paired, one: Stratum, other: Stratum, arms: list[Hashable], level: float
) -> tuple[Bools, Bools]:
    """Whether the order of every pair of arms differs between two sizes, and whether the difference is resolved."""
    flipped, p = [], []
    for a, b in combinations(arms, 2):
        differences, ps = zip(*(_difference(fit, stratum, a, b) for stratum in (one, other)), strict=True)
        flipped.append(differences[0] * differences[1] < 0)
        p.append(max(ps))
    return np.array(flipped), holm(np.array(p, dtype=np.float64)) <= 1 - level


def _difference(fit: Paired, stratum: Stratum, a: Hashable, b: Hashable) -> tuple[float, float]:
    difference, variance = stratum.difference(a, b)
    return difference, p_two_sided(difference, *fit.error(stratum, variance))


def _size_pairs(fit: Paired, size: str) -> Iterator[tuple[Stratum, Stratum, list[Hashable]]]:
    by_size: list[Stratum] = sorted(fit.strata, key=_size)
    if len(by_size) < 2:
        raise ValueError(f"{size}: must have at least two values, got only {by_size[0].key[0]!r}")
    for one, other in combinations(by_size, 2):
        arms = [each for each in one.effects if each in other.effects]
        if len(arms) < MIN_ARMS:
            where = f"{one.key[0]!r} and {other.key[0]!r}"
            raise ValueError(f"{size}: {where} have {len(arms)} arms in common; at least {MIN_ARMS} are needed")
        yield one, other, arms


def _size(stratum: Stratum) -> Any:
    return stratum.key[0]
