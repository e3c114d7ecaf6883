"""Scores by document: intervals that also cover other documents of the same kind, not only other seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

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


def bits_of_runs(documents: pd.DataFrame, runs: Sequence[Any] | pd.Series[Any]) -> tuple[Floats, Floats] | None:
    """Bits per byte of each run on each document, and each document's share of the bytes.

    Args:
        documents: from `explore.table.load_documents`, of one split.
        runs: names of runs, each once.

    Returns:
        Bits per byte (runs, documents), in the order of `runs`, and shares (documents); None if no run has scores by
        document, or if there are fewer than two documents.

    Raises:
        ValueError: a column is missing; or only some runs have scores, or scores of other documents, so that intervals
            would ignore documents although they are known.
    """
    check_columns(documents, ["run", "document", "nats", "n_bytes"])
    names = pd.Index(runs)
    rows = documents[documents["run"].isin(names) & (documents["n_bytes"] > 0)]
    nats, n_bytes = (
        rows.pivot(index="run", columns="document", values=each).astype("float64").reindex(names)
        for each in ("nats", "n_bytes")
    )
    if n_bytes.shape[1] < MIN_UNITS:
        return None
    if n_bytes.isna().any(axis=None) or (n_bytes.nunique() > 1).any():
        wrong = list(names[(n_bytes != n_bytes.mode().iloc[0]).any(axis=1).to_numpy()])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"documents: all runs or none must have scores of the same documents, got none or others of "
            f"{', '.join(map(str, wrong[:3]))}{more}; `explore eval RUN --whole --save` adds them"
        )
    sizes = np.asarray(n_bytes.to_numpy()[0], dtype=np.float64)
    return np.asarray(nats.to_numpy() / math.log(2) / sizes, dtype=np.float64), sizes / sizes.sum()


def joint_noise(values: Floats, weights: Floats) -> float:
    """Contribution of the joint noise of seeds and documents to the variance of a weighted mean.

    Args:
        values: one number per seed and document (seeds, documents).
        weights: shares of the documents, with sum 1.

    Returns:
        The variance; 0 with one seed, which cannot tell it from that of documents.
    """
    n_seeds, n_documents = values.shape
    if n_seeds < MIN_UNITS:
        return 0.0
    noise = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    variance = (noise**2).sum() / ((n_seeds - 1) * (n_documents - 1))
    return float(variance * (weights @ weights) / n_seeds)


def with_documents(error: float, dof: float, by_document: Floats, weights: Floats, joint: float) -> tuple[float, float]:
    """Standard error, and its degrees of freedom, of a weighted mean over documents that are random draws.

    The variances of seeds and documents both contain the joint noise, which is therefore subtracted once; the result is
    never below either. Degrees of freedom are Satterthwaite's, with 1 / sum of squared shares as the number of
    documents.

    Args:
        error: standard error over seeds.
        dof: degrees of freedom of `error`.
        by_document: mean over seeds, by document.
        weights: shares of the documents, with sum 1.
        joint: from `joint_noise`.
    """
    squared = float(weights @ weights)
    off = weights * (by_document - by_document @ weights)
    seeds, documents = error**2, float(off @ off) / (1 - squared)
    if seeds + documents == 0:
        return 0.0, dof
    parts = seeds**2 / dof + documents**2 / max(1 / squared - 1, 1)
    return math.sqrt(max(seeds + documents - joint, seeds, documents)), (seeds + documents) ** 2 / parts


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
    by_seed = values @ weights
    estimate = float(by_seed.mean())
    error, dof = float(by_seed.std(ddof=1)) / math.sqrt(len(values)), len(values) - 1
    error, freedom = with_documents(error, dof, values.mean(axis=0), weights, joint_noise(values, weights))
    half = t_quantile(freedom, level) * error
    return Interval(estimate, estimate - half, estimate + half, level)
