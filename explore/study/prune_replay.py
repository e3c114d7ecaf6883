"""Measures savings and losses of pruning, on learning curves of runs that were all trained to the end.

The runs arrive in random orders. Each is followed until the pruner, given the earlier runs, stops it, and it costs the
training FLOPs of that share of its schedule. Nothing is trained.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from explore.frontier import hypervolume, pareto_front
from explore.study.pruning import Curve, FrontPruner

COST, ERROR = "flops_run", "val_bpb"
POINT = re.compile(r"val_bpb_at_(\d+)")
BUDGETS = (0.1, 0.25, 0.5)
"""Shares of the FLOPs of all runs at which searches with and without pruning are compared."""


class Search(NamedTuple):
    """A simulated search: one order of arrival, with or without a pruner.

    Attributes:
        finished: indices of the runs trained to the end, in order of finishing.
        spent: cumulative training FLOPs when each of these finished.
        total: training FLOPs of the whole search.
    """

    finished: list[int]
    spent: list[float]
    total: float

    def at(self, flops: float) -> list[int]:
        """Indices of the runs finished by the time `flops` are spent."""
        return self.finished[: bisect_right(self.spent, flops)]


def read_curves(table: pd.DataFrame) -> list[Curve]:
    """The runs of a table with columns `flops_run`, `val_bpb` and, for shares in percent, `val_bpb_at_20` and so on.

    Raises:
        ValueError: a column is missing, or has a missing number.
    """
    shares = {name: int(match[1]) / 100 for name in map(str, table.columns) if (match := POINT.fullmatch(name))}
    points = sorted((share, name) for name, share in shares.items() if share < 1)
    if not points:
        raise ValueError("table: no column val_bpb_at_20 or of another share of the schedule below 100")
    for column in (COST, ERROR, *(name for _, name in points)):
        if column not in table:
            raise ValueError(f"table: column {column!r} is missing; it has {', '.join(map(str, table.columns))}")
        if not np.isfinite(table[column].to_numpy(dtype=float)).all():
            raise ValueError(f"table: {column} must be there for every row")
    return [
        Curve((row[COST],), tuple((share, row[name]) for share, name in points)) for row in table.to_dict("records")
    ]


def simulate_search(curves: Sequence[Curve], order: Sequence[int], pruner: FrontPruner | None) -> Search:
    """Simulates a search in which runs arrive in this order and the pruner, if any, stops some of them."""
    earlier: list[Curve] = []
    finished, spent, total = [], [], 0.0
    for i in order:
        curve = curves[i]
        (flops,) = curve.costs
        points = () if pruner is None else curve.points
        stops = (share for share, value in points if pruner and pruner.verdict(earlier, curve.costs, share, value))
        if (share := next(stops, None)) is not None:
            total += share * flops
            continue
        total += flops
        earlier.append(curve)
        finished.append(i)
        spent.append(total)
    return Search(finished, spent, total)


def pruning_outcomes(
    table: pd.DataFrame, pruners: Sequence[FrontPruner], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Replays every order with every pruner, relative to the same order without pruning.

    Yields:
        One row with the pruner's `margin`, `min_trials` and `min_fraction`; the `seed` of the order; `spent`, the
        share of all training FLOPs; `stopped`, the share of runs stopped; `killed`, the share of the final front
        stopped; and `volume_at_25` and so on, the hypervolume at 25% of all FLOPs relative to no pruning.
        `volume_at_100` compares the final hypervolumes.
    """
    curves = read_curves(table)
    on_front = pareto_front(table, COST, ERROR).to_numpy().nonzero()[0]
    reference = float(table[COST].max()), float(table[ERROR].max())

    def volume(search: Search, share: float) -> float:
        return hypervolume(table.iloc[search.at(share * total)], reference, COST, ERROR)

    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(curves)).tolist()
        plain = simulate_search(curves, order, None)
        total = plain.total
        volumes = {share: volume(plain, share) for share in (*BUDGETS, 1.0)}
        for pruner in pruners:
            pruned = simulate_search(curves, order, pruner)
            yield {
                "margin": pruner.margin,
                "min_trials": pruner.min_trials,
                "min_fraction": pruner.min_fraction,
                "seed": seed,
                "spent": pruned.total / total,
                "stopped": 1 - len(pruned.finished) / len(curves),
                "killed": 1 - float(np.isin(on_front, pruned.finished).mean()),
                **{
                    f"volume_at_{round(100 * share)}": volume(pruned, share) / before if before else np.nan
                    for share, before in volumes.items()
                },
            }


def mean_outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the orders for each pruner; columns `_low` and `_high` enclose 95% of the orders."""
    groups = rows.drop(columns="seed").groupby(["margin", "min_trials", "min_fraction"])
    parts = {"": groups.mean(), "_low": groups.quantile(0.025), "_high": groups.quantile(0.975)}
    joined = pd.concat([part.add_suffix(suffix) for suffix, part in parts.items()], axis=1)
    return joined.reset_index()
