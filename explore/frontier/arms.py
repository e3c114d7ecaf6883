"""The arms of a study side by side: what each was given, how far that is off its baseline's, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from explore.frontier.scores import cluster_interval
from explore.quantities import headlines

BUDGETS = ("params_active", "params_total", "flops_fwd", "flops_run")
SETTINGS = ("tokens", "n_steps", "lr", "tuned", "lr_sensitivity")
FLOOR = "ngram_test_bpb"
"""Column of what an n-gram model of the same tokens reaches; it stands beside the scores that must beat it."""


def arms_table(table: pd.DataFrame, arm: str, baseline: Hashable, *, by: Sequence[str] = ()) -> pd.DataFrame:
    """One row an arm: seeds, budgets with their residuals, learning rate and mean scores.

    Args:
        table: one row a run, as `load_runs` gives it.
        arm: column that names the arms.
        baseline: the arm that the residuals are taken from.
        by: columns of which each combination is a table by itself, such as size.

    Returns:
        The columns `by` and `arm`, n_seeds, tokens, n_steps, lr, tuned (all of its runs are), lr_sensitivity, each
        budget with `_residual` (its share above the baseline's), and the means of the headline scores that some run has
        and of the floor that they must beat.

    Raises:
        ValueError: a column is missing, or the baseline has no run somewhere.
    """
    keys = [*by, arm]
    if missing := [column for column in (*keys, *BUDGETS, *SETTINGS) if column not in table]:
        raise ValueError(f"column {missing[0]!r} is not in the table; it has {', '.join(map(str, table.columns))}")
    groups = table.groupby(keys, observed=True, sort=False)
    found = groups[["tokens", "n_steps", "lr", "lr_sensitivity", *BUDGETS]].first().reset_index()
    found.insert(len(keys), "n_seeds", groups.size().to_numpy())
    found.insert(len(keys) + 4, "tuned", groups["tuned"].all().to_numpy(dtype=bool))
    own = {_key(row, by): row for row in found.to_dict("records") if row[arm] == baseline}
    rows = [(row, own.get(_key(row, by))) for row in found.to_dict("records")]
    if alone := [_key(row, by) for row, of in rows if of is None]:
        raise ValueError(f"{arm}: the baseline {baseline!r} has no run" + (f" at {alone[0]}" if by else ""))
    for budget in BUDGETS:
        residuals = [row[budget] / of[budget] - 1 for row, of in rows if of is not None]
        found.insert(list(found.columns).index(budget) + 1, f"{budget}_residual", residuals)
    scores = [each.name for each in headlines(table.columns) if each.is_quality and each.name in table]
    scores += [FLOOR] if FLOOR in table else []
    means = groups[scores].mean().dropna(axis="columns", how="all")
    return found.join(means.reset_index(drop=True))


def pairs_table(runs: pd.DataFrame, pairs: pd.DataFrame, arm: str, baseline: Hashable) -> pd.DataFrame:
    """Accuracy of every arm on minimal pairs and its difference from a baseline; intervals resample paradigms.

    Args:
        runs: a row a run, with `run` and the column `arm`.
        pairs: from `explore.table.load_pairs`; runs that have none are left out.

    Returns:
        One row a suite and arm: suite, arm, n_runs, n_paradigms, accuracy, low, high, and difference, difference_low
        and difference_high, which are NaN for the baseline. No row where nothing was measured.

    Raises:
        ValueError: a suite has fewer than five paradigms, or those of an arm and the baseline differ.
    """
    records = []
    for suite, scores in pairs.merge(runs[["run", arm]], on="run").groupby("suite"):
        of: dict[Hashable, pd.DataFrame] = dict(list(scores.groupby(arm)))
        for each, rows in of.items():
            own = cluster_interval(rows)
            beside = None if each == baseline or baseline not in of else cluster_interval(rows, baseline=of[baseline])
            records.append(
                {
                    "suite": suite,
                    arm: each,
                    "n_runs": rows["run"].nunique(),
                    "n_paradigms": rows["uid"].nunique(),
                    "accuracy": own.estimate,
                    "low": own.low,
                    "high": own.high,
                    "difference": math.nan if beside is None else beside.estimate,
                    "difference_low": math.nan if beside is None else beside.low,
                    "difference_high": math.nan if beside is None else beside.high,
                }
            )
    columns = ["n_runs", "n_paradigms", "accuracy", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(records, columns=["suite", arm, *columns])


def _key(row: Mapping[Any, Any], by: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[column] for column in by)
