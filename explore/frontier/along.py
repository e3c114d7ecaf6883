"""Curves of training: differences between arms, and the change of the loss at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from explore.frontier.columns import check_columns


def paired_curves(
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    arm: str,
    baseline: str,
    window: int,
    *,
    by: Sequence[str] = (),
    pair: str = "seed",
    value: str = "loss",
) -> pd.DataFrame:
    """Differences of arms from a baseline with the same seeds, averaged over windows of steps.

    Args:
        runs: one row per run, with the columns run, `by`, `arm` and `pair`.
        curves: from `explore.table.load_metrics`; runs without a curve are left out.
        arm: column that names the arms.
        window: steps per window.
        by: columns such as size; each combination of their values is compared separately.
        value: column of `curves` that is compared.

    Returns:
        One row per combination of `by`, arm and window: these columns, step (the last of the window), flops_run (of the
        arm until then), n_pairs, difference (mean over the pairs), low and high (smallest and largest difference of a
        pair). It is empty if no pair has curves.

    Raises:
        ValueError: a column of `runs` is missing.
    """
    check_columns(runs, ["run", *by, arm, pair], "runs")
    columns = [*by, arm, "step", "flops_run", "n_pairs", "difference", "low", "high"]
    if value not in curves or baseline not in set(runs[arm]):
        return pd.DataFrame(columns=columns)
    known = curves[["run", "step", value]].assign(flops_run=curves.get("flops_run", math.nan)).dropna(subset=value)
    along = known.merge(runs[["run", *by, arm, pair]], on="run")
    last = along.groupby("run")["step"].transform("max")
    along["step"] = (((along["step"] - 1) // window + 1) * window).clip(upper=last)
    windows = along.groupby([*by, pair, "step", arm])
    means = windows[value].mean().unstack(arm)
    if baseline not in means:
        return pd.DataFrame(columns=columns)
    gaps = pd.DataFrame({"gap": means.sub(means[baseline], axis=0).drop(columns=baseline).stack().dropna()})
    groups = gaps.assign(flops_run=windows["flops_run"].max()).reset_index().groupby([*by, arm, "step"])
    found = groups["gap"].agg(n_pairs="size", difference="mean", low="min", high="max")
    found = found.assign(flops_run=groups["flops_run"].mean()).reset_index()
    return pd.DataFrame(found[columns])


def last_change(
    curves: pd.DataFrame, runs: Sequence[Any] | pd.Series[Any], fraction: float
) -> tuple[float, float] | None:
    """Mean change of the loss over the last fraction of the runs, and two standard errors; None if unknown."""
    column = next((each for each in ("val_bpb", "val_loss") if each in curves and curves[each].notna().any()), None)
    if column is None or "step" not in curves:
        return None
    changes = []
    for run in dict.fromkeys(runs):
        points = curves[(curves["run"] == run) & curves[column].notna()].sort_values("step")
        before = points[points["step"] <= (1 - fraction) * points["step"].max()] if len(points) else points
        if before.empty:
            return None
        changes.append(float(points[column].iloc[-1] - before[column].iloc[-1]))
    if len(changes) < 2:
        return None
    values = np.array(changes)
    return float(values.mean()), float(2 * values.std(ddof=1) / math.sqrt(len(values)))
