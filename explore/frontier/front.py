"""The Pareto front of a table of runs, and its hypervolume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from explore.frontier.columns import Floats, check_columns, numbers, oriented, oriented_reference
from explore.quantities import EVAL_DATA, quantity


def pareto_front(table: pd.DataFrame, cost: str = "flops_run", error: str = "val_bpb") -> pd.Series[Any]:
    """Marks the rows that no other row beats.

    Lower is better in both columns unless `explore.quantities` declares the opposite, as for `recall`.

    A row is beaten if another is at least as good in both columns and better in one. Equal rows do not beat each other.
    A row with a missing or infinite value is never on the front and beats nothing. If the table names the data on which
    runs were evaluated, and a column depends on it, each data set has its own front.

    Returns:
        A boolean column `on_front` with the index of `table`.

    Raises:
        ValueError: a column is missing.
    """
    check_columns(table, [cost, error])
    x, y = oriented(table, cost), oriented(table, error)
    known = np.isfinite(x) & np.isfinite(y)
    front = np.zeros(len(table), dtype=bool)
    for rows in _comparable(table, cost, error):
        front[rows & known] = _unbeaten(x[rows & known], y[rows & known])
    return pd.Series(front, index=table.index, name="on_front")


def _comparable(table: pd.DataFrame, *columns: str) -> Iterator[npt.NDArray[np.bool_]]:
    """Yields the rows of each evaluation data set, or all rows at once if the columns do not depend on it."""
    if EVAL_DATA in table and any(quantity(column).is_on_own_data for column in columns):
        data = table[EVAL_DATA].astype("str").fillna("").to_numpy()
        yield from (data == each for each in np.unique(data))
    else:
        yield np.ones(len(table), dtype=bool)


def _unbeaten(x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    """Marks the finite points that no other beats; lower is better in both."""
    costs, which = np.unique(x, return_inverse=True)
    best = np.full(len(costs), np.inf)  # the lowest error at each cost
    np.minimum.at(best, which, y)
    cheaper = np.minimum.accumulate(np.concatenate([[np.inf], best]))[:-1]  # the lowest error at any lower cost
    unbeaten: npt.NDArray[np.bool_] = (y == best[which]) & (y < cheaper[which])
    return unbeaten


def hypervolume(
    table: pd.DataFrame, reference: tuple[float, float], cost: str = "flops_run", error: str = "val_bpb"
) -> float:
    """Area between the Pareto front and a reference point, with the cost on a log axis; higher is better.

    The area of the union of the rectangles from each run to the reference point (log10 cost, error): a front at a tenth
    of the cost gains one decade times its height. Compare tables only at the same reference point. Runs that are not
    better than the reference in both columns add nothing; neither do missing values.

    Args:
        reference: cost and error, in the columns' units, of a point worse than all runs that should count.

    Returns:
        Decades of cost times units of error (for the defaults: decades of FLOPs times bits per byte).

    Raises:
        ValueError: a column is missing, higher costs are better, or a cost or the reference cost is not positive.
    """
    check_columns(table, [cost, error])
    limit_cost, limit = oriented_reference(reference, cost, error)
    if not (np.isfinite(limit_cost) and limit_cost > 0 and np.isfinite(limit)):
        raise ValueError(f"reference: must be finite with a positive {cost}, got {reference!r}")
    x, y = numbers(table, cost), oriented(table, error)
    if (x <= 0).any():
        raise ValueError(f"{cost}: must be positive on a log axis, got {x[x <= 0][0]:g}")
    front = pareto_front(table, cost, error).to_numpy() & (x < limit_cost) & (y < limit)
    points = np.unique(np.stack([np.log10(x[front]), y[front]], axis=1), axis=0)  # by rising cost, hence falling error
    ends = np.append(points[1:, 0], np.log10(limit_cost))
    return float(((ends - points[:, 0]) * (limit - points[:, 1])).sum())
