"""Scores by document: intervals that also cover other documents of the same kind, not only other seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import pandas as pd

from explore.frontier.columns import Floats, check_columns
from explore.frontier.intervals import Interval, check_level, t_quantile

MIN_UNITS = 2
"""Minimum number of seeds, and of documents, for an interval."""


def document_interval(
    documents: pd.DataFrame,
    arm: Hashable,
    baseline: Hashable | None = None,
    *,
    column: str = "arm",
    pair: str = "seed",
    level: float = 0.95,
) -> Interval:
    """Bits per byte of an arm, or its difference from a baseline, with seeds and documents as random draws.

    The bits of document k with seed s are modelled as a mean, plus an effect of the seed, an effect of the document,
    and their joint noise. The estimate weights documents by their bytes, as bits per byte of a whole text do. Its
    variance is the sum of the contributions of seeds and documents, minus the noise counted in both, but never below
    either. Degrees of freedom are Satterthwaite's, with 1 / sum of squared shares as the number of documents.

    Args:
        documents: from `explore.table.load_documents`, of one split, with the columns `column` and `pair`.
        arm: value of `column` for the arm.
        baseline: value of `column` for a baseline; differences are then paired by seed and document.

    Raises:
        ValueError: a column is missing, or all runs share fewer than two seeds or documents.
    """
    check_level(level)
    check_columns(documents, [column, pair, "document", "nats", "n_bytes"])
    bits, shares = _bits(documents[documents[column] == arm], pair)
    if baseline is not None:
        other, _ = _bits(documents[documents[column] == baseline], pair)
        common = [bits.index.intersection(other.index), bits.columns.intersection(other.columns)]
        bits = bits.loc[common[0], common[1]] - other.loc[common[0], common[1]]
        shares = shares[common[1]] / shares[common[1]].sum()
    values, weights = (np.asarray(each.to_numpy(), dtype=np.float64) for each in (bits, shares))
    n_seeds, n_documents = values.shape
    if min(n_seeds, n_documents) < MIN_UNITS:
        raise ValueError(f"{pair}, document: need at least {MIN_UNITS} of each, got {n_seeds} and {n_documents}")
    return _interval(values, weights, level)


def _bits(rows: pd.DataFrame, pair: str) -> tuple[pd.DataFrame, pd.Series[float]]:
    """Bits per byte (seeds, documents), and each document's share of the bytes."""
    rows = rows[rows["n_bytes"] > 0]
    bits = rows.assign(bits=rows["nats"] / math.log(2) / rows["n_bytes"]).pivot_table(
        index=pair, columns="document", values="bits"
    )
    bits = bits.dropna(axis="columns")
    n_bytes = rows.groupby("document")["n_bytes"].first().loc[bits.columns]
    return bits, n_bytes / n_bytes.sum()


def _interval(values: Floats, weights: Floats, level: float) -> Interval:
    n_seeds, n_documents = values.shape
    by_seed, by_document = values @ weights, values.mean(axis=0)
    estimate = float(by_seed.mean())
    squared = float(weights @ weights)
    noise = values - values.mean(axis=1, keepdims=True) - by_document + values.mean()
    noise_variance = float((noise**2).sum()) / ((n_seeds - 1) * (n_documents - 1)) * squared / n_seeds
    seeds = float(by_seed.var(ddof=1)) / n_seeds
    off = weights * (by_document - estimate)
    documents = float(off @ off) / (1 - squared)
    variance = max(seeds + documents - noise_variance, seeds, documents)
    if variance == 0:
        return Interval(estimate, estimate, estimate, level)
    parts = seeds**2 / (n_seeds - 1) + documents**2 / max(1 / squared - 1, 1)
    half = t_quantile((seeds + documents) ** 2 / parts, level) * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half, level)
