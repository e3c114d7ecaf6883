"""Tables of a study's arms: their budgets, the difference from the baseline's, and their scores."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from explore.frontier.columns import check_columns
from explore.frontier.scores import cluster_interval
from explore.quantities import headlines

BUDGETS = ("params_active", "params_total", "flops_fwd", "flops_run")
SETTINGS = ("tokens", "n_steps", "lr", "tuned", "lr_sensitivity")
FLOOR = "ngram_test_bpb"
"""Column with the score of an n-gram model of the same tokens, which a model must beat."""


def arms_table(table: pd.DataFrame, arm: str, baseline: Hashable, *, by: Sequence[str] = ()) -> pd.DataFrame:
    """One row per arm: seeds, budgets with their residuals, learning rate and mean scores.

    Args:
        table: one row per run, as from `load_runs`.
        arm: column that names the arms.
        baseline: the arm relative to which residuals are computed.
        by: columns such as size; each combination of their values is treated separately.

    Returns:
        The columns `by` and `arm`, n_seeds, tokens, n_steps, lr, tuned (whether all runs are), lr_sensitivity, each
        budget with `_residual` (its relative difference from the baseline's), and the means of the headline scores and
        of the floor that they must beat.

    Raises:
        ValueError: a column is missing, or the baseline has no run in one of the combinations.
    """
    keys = [*by, arm]
    check_columns(table, [*keys, *BUDGETS, *SETTINGS])
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


def seeds_table(
    table: pd.DataFrame, arm: str, baseline: Hashable, *, by: Sequence[str] = (), value: str = "test_bpb"
) -> pd.DataFrame:
    """One row per run: its score, and the difference from the baseline's run with the same seed.

    Returns:
        The columns `by`, `arm`, seed, `value` and difference, which is NaN if the baseline has no such run.

    Raises:
        ValueError: a column is missing.
    """
    check_columns(table, [*by, arm, "seed", value])
    rows = table[[*by, arm, "seed", value]]
    own = rows[rows[arm] == baseline].drop(columns=arm).rename(columns={value: "of_baseline"})
    rows = rows.merge(own, on=[*by, "seed"], how="left")
    rows["difference"] = rows[value] - rows["of_baseline"]
    return rows.drop(columns="of_baseline").sort_values([*by, arm, "seed"], ignore_index=True)


def pairs_table(runs: pd.DataFrame, pairs: pd.DataFrame, arm: str, baseline: Hashable) -> pd.DataFrame:
    """Accuracy of every arm on minimal pairs and its difference from a baseline; intervals resample paradigms.

    Args:
        runs: one row per run, with `run` and the column `arm`.
        pairs: from `explore.table.load_pairs`; runs without pairs are left out.

    Returns:
        One row per suite and arm: suite, arm, n_runs, n_paradigms, accuracy, low, high, and difference, difference_low
        and difference_high, which are NaN for the baseline. Arms that were not measured have no row.

    Raises:
        ValueError: a suite has fewer than five paradigms, or an arm and the baseline have different ones.
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


def apart_from_diverged(runs: pd.DataFrame, arm: str, value: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Separates the arms of which a run diverged, so that no comparison uses the runs that they have left.

    Returns:
        All runs, without scores of diverged ones; the runs of arms without one; and `arm` and n_diverged of the others.
    """
    runs = runs.assign(**{value: runs[value].where(runs["status"] != "diverged")})
    diverged = runs[runs["status"] == "diverged"].groupby(arm).size().rename("n_diverged").reset_index()
    return runs, runs[~runs[arm].isin(diverged[arm])], diverged
