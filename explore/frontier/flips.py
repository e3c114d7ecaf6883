"""The flip detector: does the ranking of arms at one size survive at another, and which pairs change places?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from explore.frontier.intervals import NOT_RESOLVED, check_level, holm, p_two_sided
from explore.frontier.paired import Paired, Stratum, paired

FLIPS, HOLDS = "flips", "holds"
MIN_ARMS = 3


def rank_correlation(
    table: pd.DataFrame, arm: str, size: str, error: str = "val_bpb", pair: str = "seed", level: float = 0.95
) -> pd.DataFrame:
    """Kendall's tau between the rankings of arms at each two sizes, and the shares of pairs of arms that flip.

    Noise in both rankings draws tau towards 0, and a bootstrap, which adds noise once more, even further: where arms
    lie close, its interval often misses the tau of the true effects. So the interval is what tau can be when every pair
    of arms whose order is not resolved (see `order_changes`) goes either way: from 2 holds - 1 to 1 - 2 flips. It is
    wide where much is not resolved, and holds the truth with a probability of `level` or more.

    Args:
        arm: column that names the arms; those that both sizes have are ranked.
        size: column of the sizes.
        pair: column of the seed, which sets the order of the data.

    Returns:
        One row a pair of sizes, in the order of the sizes: size_a, size_b, n_arms, tau (of the effects as estimated),
        low, high, flipped (share of the pairs of arms whose order differs), and the shares flips and holds that are
        resolved.

    Raises:
        ValueError: a column is missing, a run is there twice, or two sizes have fewer than three arms in common.
    """
    from scipy import stats

    changes = order_changes(table, arm, size, error, pair, level)
    rows = []
    for one, other, arms in _size_pairs(paired(table, arm, [size], pair, error), size):
        sizes = (one.key[0], other.key[0])
        tau = stats.kendalltau([one.effects[each] for each in arms], [other.effects[each] for each in arms]).statistic
        here = changes[(changes["size_a"] == sizes[0]) & (changes["size_b"] == sizes[1])]
        flipped = float((here["difference_a"] * here["difference_b"] < 0).mean())
        flips, holds = (float((here["verdict"] == verdict).mean()) for verdict in (FLIPS, HOLDS))
        rows.append((*sizes, len(arms), float(tau), 2 * holds - 1, 1 - 2 * flips, flipped, flips, holds))
    columns = ["size_a", "size_b", "n_arms", "tau", "low", "high", "flipped", FLIPS, HOLDS]
    return pd.DataFrame(rows, columns=columns)


def order_changes(
    table: pd.DataFrame, arm: str, size: str, error: str = "val_bpb", pair: str = "seed", level: float = 0.95
) -> pd.DataFrame:
    """Every two arms at every two sizes: whether their order flips, holds, or is not resolved.

    An order is resolved when both differences are; its p value is the larger of their two, and Holm's correction is
    over all pairs of arms at a pair of sizes.

    Returns:
        One row a pair of sizes and of arms: size_a, size_b, arm_a, arm_b, difference_a and difference_b (arm_a less
        arm_b at either size), p, p_holm and verdict.

    Raises:
        ValueError: as `rank_correlation` does.
    """
    check_level(level)
    fit = paired(table, arm, [size], pair, error)
    tables = []
    for one, other, arms in _size_pairs(fit, size):
        rows = []
        for a, b in combinations(arms, 2):
            differences, p = zip(*(_difference(fit, stratum, a, b) for stratum in (one, other)), strict=True)
            rows.append((one.key[0], other.key[0], a, b, *differences, max(p)))
        columns = ["size_a", "size_b", "arm_a", "arm_b", "difference_a", "difference_b", "p"]
        found = pd.DataFrame(rows, columns=columns)
        found["p_holm"] = holm(found["p"].to_numpy(dtype=np.float64))
        order = np.where(found["difference_a"] * found["difference_b"] < 0, FLIPS, HOLDS)
        tables.append(found.assign(verdict=np.where(found["p_holm"] <= 1 - level, order, NOT_RESOLVED)))
    return pd.concat(tables, ignore_index=True)


def _difference(fit: Paired, stratum: Stratum, a: Hashable, b: Hashable) -> tuple[float, float]:
    difference, variance = stratum.difference(a, b)
    return difference, p_two_sided(difference, fit.sd * math.sqrt(variance), fit.dof)


def _size_pairs(fit: Paired, size: str) -> Iterator[tuple[Stratum, Stratum, list[Hashable]]]:
    by_size: list[Stratum] = sorted(fit.strata, key=_size)
    if len(by_size) < 2:
        raise ValueError(f"{size}: {by_size[0].key[0]!r} is the only one; at least two are needed")
    for one, other in combinations(by_size, 2):
        arms = [each for each in one.effects if each in other.effects]
        if len(arms) < MIN_ARMS:
            where = f"{one.key[0]!r} and {other.key[0]!r}"
            raise ValueError(f"{size}: {where} have {len(arms)} arms in common; at least {MIN_ARMS} are needed")
        yield one, other, arms


def _size(stratum: Stratum) -> Any:
    return stratum.key[0]
