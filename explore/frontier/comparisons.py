"""Arms against a baseline from the same seeds, corrected for how many comparisons were meant to decide."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from explore.frontier.intervals import NOT_RESOLVED, check_level, holm, p_two_sided, t_quantile
from explore.frontier.paired import Paired, paired
from explore.quantities import quantity

BETTER, WORSE, EXPLORATORY = "better", "worse", "exploratory"
MAX_PAIRS = 10_000


def compare(
    table: pd.DataFrame,
    arm: str,
    baseline: Hashable,
    *,
    by: Sequence[str] = (),
    strata: Sequence[str] = (),
    pair: str = "seed",
    value: str = "test_bpb",
    primary: Collection[Hashable] | None = None,
    better: Literal["lower", "higher"] | None = None,
    min_pairs: int = 3,
    level: float = 0.95,
) -> pd.DataFrame:
    """Differences of arms from a baseline that was run from the same seeds.

    A run's value is the effect of its arm, of its seed, and noise, within a size; so a difference is the mean of the
    paired ones where no run is missing. The variance of the noise is pooled over arms, `by` and `strata`. The interval
    is that of one comparison by itself; the verdict is Holm's over all primary comparisons, so of the verdicts that
    should be `not resolved` any is another with a probability of 1 - `level` at most.

    Args:
        arm: column that names the arms.
        baseline: its value for the baseline.
        by: columns of which each combination is compared by itself, such as size.
        strata: columns over whose combinations a difference is averaged, with the noise taken within each.
        pair: column of the seed, which sets the order of the data.
        primary: the comparisons that were named beforehand: arms, or tuples of the values of `by` and an arm; all
            comparisons unless given. Others have no adjusted p value, and their verdict is `exploratory`.
        better: which values are better; as `explore.quantities` declares it when absent.
        min_pairs: seeds that an arm must share with the baseline in every stratum.

    Returns:
        One row a comparison: the columns `by` and `arm`, n_pairs, difference (arm less baseline), low, high, sd (noise
        of one run), dof, p, primary, p_holm and verdict: better, worse, not resolved or exploratory.

    Raises:
        ValueError: a column, the baseline or a primary comparison is not there; a run is there twice; too few pairs.
    """
    check_level(level)
    better = better or quantity(value).better or "lower"
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher', got {better!r}")
    fit = paired(table, arm, [*by, *strata], pair, value)
    labels = [*by, arm]
    rows = list(_differences(fit, len(by), arm, baseline, pair, min_pairs))
    if not rows:
        raise ValueError(f"{arm}: no arm stands beside the baseline {baseline!r}")
    named = _named([key for key, *_ in rows], primary)
    p = np.array([p_two_sided(difference, error, fit.dof) for _, _, difference, error in rows])
    adjusted = np.full(len(rows), np.nan)
    adjusted[named] = holm(p[named])
    half = t_quantile(fit.dof, level)
    records = []
    for i, (key, n_pairs, difference, error) in enumerate(rows):
        verdict = NOT_RESOLVED if named[i] else EXPLORATORY
        if adjusted[i] <= 1 - level:
            verdict = BETTER if (difference < 0) == (better == "lower") else WORSE
        interval = (difference, difference - half * error, difference + half * error)
        records.append((*key, n_pairs, *interval, fit.sd, fit.dof, p[i], named[i], adjusted[i], verdict))
    rest = ["n_pairs", "difference", "low", "high", "sd", "dof", "p", "primary", "p_holm", "verdict"]
    return pd.DataFrame(records, columns=[*labels, *rest])


def _differences(
    fit: Paired, n_by: int, arm: str, baseline: Hashable, pair: str, min_pairs: int
) -> Iterator[tuple[tuple[Hashable, ...], int, float, float]]:
    """Each comparison's key, pairs, difference and standard error."""
    if not any(baseline in stratum.effects for stratum in fit.strata):
        raise ValueError(f"{arm}: the baseline {baseline!r} has no run")
    found: dict[tuple[Hashable, ...], list[tuple[int, float, float]]] = {}
    for stratum in fit.strata:
        for each in stratum.effects if baseline in stratum.effects else ():
            if each == baseline:
                continue
            n_pairs = len(stratum.seeds[each] & stratum.seeds[baseline])
            if n_pairs < min_pairs:
                where = f" at {stratum.key}" if stratum.key else ""
                raise ValueError(f"{pair}: {each!r} shares {n_pairs} with the baseline{where}; at least {min_pairs}")
            found.setdefault((*stratum.key[:n_by], each), []).append((n_pairs, *stratum.difference(each, baseline)))
    for key, parts in found.items():
        error = fit.sd * math.sqrt(sum(variance for *_, variance in parts)) / len(parts)
        yield key, sum(n for n, *_ in parts), sum(difference for _, difference, _ in parts) / len(parts), error


def _named(
    keys: list[tuple[Hashable, ...]], primary: Collection[Hashable] | None
) -> np.ndarray[tuple[int], np.dtype[np.bool]]:
    if primary is None:
        return np.ones(len(keys), dtype=bool)
    for name in primary:
        if not any(name in (key, key[-1]) for key in keys):
            raise ValueError(f"primary: {name!r} is no comparison; there are {', '.join(map(str, keys))}")
    return np.array([key in primary or key[-1] in primary for key in keys], dtype=bool)


def n_for_half_width(sd: float, half_width: float, level: float = 0.95, pooled_over: int = 1) -> int:
    """Pairs of runs that a comparison needs for an interval of this half-width, at least three.

    Args:
        sd: standard deviation of the noise of one run, as `compare` and pilots tell it.
        half_width: in the unit of `sd`.
        pooled_over: comparisons (arms times sizes) over which the variance will be pooled.

    Raises:
        ValueError: `sd` or `half_width` is not positive, or more than 10,000 pairs would be needed.
    """
    for name, number in (("sd", sd), ("half_width", half_width), ("pooled_over", pooled_over)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}: must be positive, got {number!r}")
    for n in range(3, MAX_PAIRS + 1):
        if t_quantile(pooled_over * (n - 1), level) * sd * math.sqrt(2 / n) <= half_width:
            return n
    raise ValueError(f"half_width: {half_width:g} needs more than {MAX_PAIRS} pairs at a noise of {sd:g}")
