"""The same runs on other axes of cost: which are on the front, and which changes are resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from explore.frontier.bands import BEHIND, ON_FRONT, seed_bands
from explore.frontier.columns import check_columns, numbers
from explore.frontier.front import pareto_front
from explore.frontier.intervals import NOT_RESOLVED
from explore.frontier.repeats import repeats

if TYPE_CHECKING:
    from explore.experiment import Experiment

STAYS, ENTERS, LEAVES, OFF = "stays", "enters", "leaves", "off"


def experiments_of(*roots: str | Path) -> dict[str, Experiment]:
    """Returns the experiments of all runs below the roots, by their key in the table of runs.

    Raises:
        ValueError: a root holds no run.
    """
    from explore.runs import find_runs

    return {run.key: run.load_experiment() for run in find_runs(*roots) if run.key is not None}


def add_axes(
    table: pd.DataFrame, experiments: Mapping[str, Experiment], contexts: Sequence[int] = (4096,), key: str = "key"
) -> pd.DataFrame:
    """Adds the cost of every run on other axes, computed in closed form from its experiment.

    Args:
        table: with the columns `key` and tokens.
        experiments: experiments by `key`, as from `experiments_of`.
        contexts: context lengths of decoding, in tokens.

    Returns:
        The table with flops_run_megatron, flops_run_palm and flops_run_6nd (training FLOPs of the run as each
        convention counts them, beside the exact flops_run), params_active, params_total, and decode_bytes_N for every
        context N: bytes read and written to decode one token of one sequence.

    Raises:
        ValueError: a column, or the experiment of a run, is missing.
    """
    from explore.cost import CONVENTIONS, flops_train

    check_columns(table, [key])
    tokens = numbers(table, "tokens")
    if absent := [str(each) for each in table[key] if each not in experiments]:
        raise ValueError(f"{key}: no experiment for {', '.join(absent[:3])}; {len(absent)} rows have none")
    rows: dict[str, dict[str, float]] = {}
    for each in table[key].unique():
        experiment = experiments[each]
        ledger, cost = experiment.model.ledger(experiment.data.seq_len), experiment.model.cost(experiment.data.seq_len)
        row = {f"flops_run_{name}": flops_train(ledger, name) for name in CONVENTIONS if name != "exact"}
        row |= {"params_active": cost.params_active, "params_total": cost.params_total}
        rows[each] = row | {f"decode_bytes_{n}": experiment.model.cost(n).decode_bytes for n in contexts}
    columns = {name: np.array([rows[each][name] for each in table[key]]) for name in next(iter(rows.values()), {})}
    per_token = [name for name in columns if name.startswith("flops_run_")]
    return table.assign(**columns | {name: columns[name] * tokens for name in per_token})


def front_changes(
    table: pd.DataFrame, axes: Sequence[str], by: Sequence[str], error: str = "val_bpb", level: float = 0.95
) -> pd.DataFrame:
    """Finds which points are on the front on each axis of cost, compared with the first axis.

    Args:
        axes: columns of cost; the others are compared with the first.
        by: columns whose values identify a point.

    Returns:
        One row per axis and point: axis, the columns `by`, cost, error (means over seeds), on_front, standing (from
        `seed_bands`; `not resolved` if no point has two runs), change (`stays`, `enters`, `leaves` or `off`, by the
        means) and resolved: whether the standing is resolved on both axes, so that the change exceeds noise.

    Raises:
        ValueError: a column is missing, `axes` is empty, or a point is missing on only some axes.
    """
    if not axes:
        raise ValueError("axes must name at least one column of cost, got none")
    tables = [_on_axis(table, axis, by, error, level) for axis in axes]
    first = tables[0]
    for axis, other in zip(axes, tables, strict=True):
        if not other[list(by)].equals(first[list(by)]):
            raise ValueError(f"{axis}: must have the same points as {axes[0]}; a value is missing on one of them")
    reference, decided = first["on_front"].to_numpy(), (first["standing"] != NOT_RESOLVED).to_numpy()
    words = np.array([[OFF, ENTERS], [LEAVES, STAYS]])
    for i, other in enumerate(tables):
        now = other["on_front"].to_numpy()
        resolved = decided & (other["standing"] != NOT_RESOLVED).to_numpy()
        agrees = (other["standing"] == np.where(now, ON_FRONT, BEHIND)).to_numpy()
        tables[i] = other.assign(change=words[reference.astype(int), now.astype(int)], resolved=resolved & agrees)
    return pd.concat(tables, ignore_index=True)


def _on_axis(table: pd.DataFrame, axis: str, by: Sequence[str], error: str, level: float) -> pd.DataFrame:
    points = repeats(table, by, axis, error)
    if points.spread is not None:
        found = seed_bands(table, by, axis, error, level)
    else:
        found = points.table.assign(on_front=pareto_front(points.table, axis, error), standing=NOT_RESOLVED)
    found = found.rename(columns={axis: "cost", error: "error"})[[*by, "cost", "error", "on_front", "standing"]]
    return found.assign(axis=axis)[["axis", *by, "cost", "error", "on_front", "standing"]]
