"""Paired comparisons of arms with a baseline, corrected for the number of primary comparisons."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, check_columns, numbers
from explore.frontier.documents import bits_of_runs, joint_noise, with_documents
from explore.frontier.intervals import (
    NOT_RESOLVED,
    check_level,
    holm,
    p_equivalent,
    p_two_sided,
    resolvable,
    t_quantile,
)
from explore.frontier.noise import NoiseKind
from explore.frontier.paired import Paired, Stratum, paired
from explore.quantities import quantity

BETTER, WORSE, EXPLORATORY, EQUIVALENT = "better", "worse", "exploratory", "equivalent"
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
    noise: NoiseKind = "auto",
    margin: float | None = None,
    documents: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Differences of arms from a baseline with the same seeds.

    Within a size, the value of a run is the effect of its arm, plus that of its seed, plus noise; without missing runs
    a difference is the mean of the paired differences. All arms of a size share one noise variance; between sizes it
    follows `noise`. If all runs have scores of the same documents, the difference is that of the whole text, paired by
    document, and its error includes other documents of the same kind.

    Intervals are not corrected. Verdicts use Holm's correction over all primary comparisons: the probability that any
    arm without a true difference is called `better` or `worse` is at most 1 - `level`. Otherwise an arm is `equivalent`
    if two one-sided tests, corrected in the same way, place its difference within `margin`.

    Args:
        arm: column that names the arms.
        baseline: name of the baseline.
        by: columns such as size; each combination of their values is compared separately.
        strata: columns over whose combinations a difference is averaged, with the noise estimated within each.
        pair: column of the seed, which sets the order of the data.
        primary: the comparisons named in advance: arms, or tuples of the values of `by` and an arm; None means all. The
            other comparisons have no adjusted p value and the verdict `exploratory`.
        better: which values are better; None follows `explore.quantities`.
        min_pairs: seeds that an arm must share with the baseline in every stratum.
        noise: how the noise changes between sizes, as in `explore.frontier.noise.fit_noise`.
        margin: largest difference of arms that count as equivalent, in the unit of `value`.
        documents: scores of the runs by document, from `explore.table.load_documents`, of the split of `value`; the
            table then needs a column `run`. Without them an interval covers other seeds only.

    Returns:
        One row per comparison: the columns `by` and `arm`, n_pairs, n_documents (documents that the interval includes;
        0 if it includes seeds alone), difference (arm minus baseline), low, high, sd (noise of one run; the root of the
        mean variance over strata), dof, noise (its kind), bartlett_p (test of equal variances over all sizes),
        resolvable (smallest difference detected with 80% power), p, p_equivalent (NaN without a margin), primary,
        p_holm and verdict: better, worse, equivalent, not resolved or exploratory.

    Raises:
        ValueError: a column, the baseline or a primary comparison is missing; a run occurs twice; there are too few
            pairs; the margin is not positive; or documents are given for a value other than bits per byte.
    """
    check_level(level)
    if margin is not None and not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be positive, got {margin!r}")
    check_columns(table, [*by, *strata, arm, pair, value, *([] if documents is None else ["run"])])
    better = better or quantity(value).better or "lower"
    if better not in ("lower", "higher"):
        raise ValueError(f"better must be 'lower' or 'higher', got {better!r}")
    table, scores = (table, None) if documents is None else _of_documents(table, value, documents)
    fit = paired(table, arm, [*by, *strata], pair, value, noise)
    labels = [*by, arm]
    rows = list(_differences(fit, len(by), arm, baseline, pair, min_pairs, scores))
    n_documents = 0 if scores is None else len(scores[1])
    if not rows:
        raise ValueError(f"{arm}: must have an arm other than the baseline {baseline!r}, got none")
    named = _named([row.key for row in rows], primary)
    p = np.array([p_two_sided(row.difference, row.error, row.dof) for row in rows])
    same = np.full(len(rows), np.nan)
    if margin is not None:
        same = np.array([p_equivalent(row.difference, row.error, row.dof, margin) for row in rows])
    adjusted, adjusted_same = np.full((2, len(rows)), np.nan)
    adjusted[named], adjusted_same[named] = holm(p[named]), holm(same[named])
    records = []
    for i, row in enumerate(rows):
        verdict = NOT_RESOLVED if named[i] else EXPLORATORY
        if adjusted[i] <= 1 - level:
            verdict = BETTER if (row.difference < 0) == (better == "lower") else WORSE
        elif adjusted_same[i] <= 1 - level:
            verdict = EQUIVALENT
        half = t_quantile(row.dof, level) * row.error
        interval = (row.difference, row.difference - half, row.difference + half)
        about = (row.sd, row.dof, fit.noise.kind, fit.noise.bartlett_p, resolvable(row.error, row.dof, level))
        test = (p[i], same[i], named[i], adjusted[i], verdict)
        records.append((*row.key, row.n_pairs, n_documents, *interval, *about, *test))
    rest = ["n_pairs", "n_documents", "difference", "low", "high", "sd", "dof", "noise", "bartlett_p", "resolvable"]
    return pd.DataFrame(records, columns=[*labels, *rest, "p", "p_equivalent", "primary", "p_holm", "verdict"])


def _of_documents(
    table: pd.DataFrame, value: str, documents: pd.DataFrame
) -> tuple[pd.DataFrame, tuple[Floats, Floats] | None]:
    """The rows with a known value, which becomes that of the whole text, and their bits per byte by document.

    Without documents of all runs, the table as it was, and None.
    """
    if not value.endswith("_bpb"):
        raise ValueError(f"value must be bits per byte if documents are given, got {value!r}")
    known = table[np.isfinite(numbers(table, value))].reset_index(drop=True)
    scores = bits_of_runs(documents, known["run"])
    if scores is None:
        return table, None
    bits, shares = scores
    return known.assign(**{value: bits @ shares}), scores


class _Difference(NamedTuple):
    """One comparison: its key, its pairs, and the difference with its noise."""

    key: tuple[Hashable, ...]
    n_pairs: int
    difference: float
    sd: float
    error: float
    dof: float


def _differences(
    fit: Paired,
    n_by: int,
    arm: str,
    baseline: Hashable,
    pair: str,
    min_pairs: int,
    scores: tuple[Floats, Floats] | None,
) -> Iterator[_Difference]:
    if not any(baseline in stratum.effects for stratum in fit.strata):
        raise ValueError(f"{arm}: the baseline {baseline!r} has no run")
    found: dict[tuple[Hashable, ...], list[tuple[int, int, float, float]]] = {}
    for place, stratum in enumerate(fit.strata):
        for each in stratum.effects if baseline in stratum.effects else ():
            if each == baseline:
                continue
            n_pairs = len(stratum.rows[each].keys() & stratum.rows[baseline].keys())
            if n_pairs < min_pairs:
                where = f" at {stratum.key}" if stratum.key else ""
                raise ValueError(f"{pair}: {each!r} shares {n_pairs} with the baseline{where}; at least {min_pairs}")
            key = (*stratum.key[:n_by], each)
            found.setdefault(key, []).append((place, n_pairs, *stratum.difference(each, baseline)))
    for key, parts in found.items():
        weights = np.zeros(len(fit.strata))
        for place, _, _, variance in parts:
            weights[place] = variance / len(parts) ** 2
        variances = fit.noise.sd[[place for place, *_ in parts]] ** 2
        n_pairs, difference = sum(n for _, n, *_ in parts), sum(part[2] for part in parts) / len(parts)
        error, dof = fit.noise.error(weights)
        if scores is not None:
            within = [fit.strata[place] for place, *_ in parts]
            error, dof = _with_documents(error, dof, within, key[-1], baseline, *scores)
        yield _Difference(key, n_pairs, difference, math.sqrt(variances.mean()), error, dof)


def _with_documents(
    error: float,
    dof: float,
    strata: Sequence[Stratum],
    arm: Hashable,
    baseline: Hashable,
    bits: Floats,
    shares: Floats,
) -> tuple[float, float]:
    """Adds documents to the standard error of a mean difference over strata, all of which have the same documents."""
    by_document, joint = np.zeros(len(shares)), 0.0
    for stratum in strata:
        own, other = stratum.rows[arm], stratum.rows[baseline]
        shared = [seed for seed in own if seed in other]
        gaps = bits[[own[seed] for seed in shared]] - bits[[other[seed] for seed in shared]]
        by_document += gaps.mean(axis=0) / len(strata)
        joint += joint_noise(gaps, shares) / len(strata) ** 2
    return with_documents(error, dof, by_document, shares, joint)


def _named(
    keys: list[tuple[Hashable, ...]], primary: Collection[Hashable] | None
) -> np.ndarray[tuple[int], np.dtype[np.bool]]:
    if primary is None:
        return np.ones(len(keys), dtype=bool)
    for name in primary:
        if not any(name in (key, key[-1]) for key in keys):
            raise ValueError(f"primary: {name!r} is not a comparison; there are {', '.join(map(str, keys))}")
    return np.array([key in primary or key[-1] in primary for key in keys], dtype=bool)


def n_for_half_width(sd: float, half_width: float, level: float = 0.95, pooled_over: int = 1) -> int:
    """Number of pairs of runs (at least three) for an interval of this half-width.

    Args:
        sd: standard deviation of the noise of one run, as from `compare` or pilots.
        half_width: half-width of the interval, in the unit of `sd`.
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
