"""What the figures of runs share: the labels of columns, which rows are drawn, and the axes they are drawn on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from explore.figures.axes import dress, is_log, log_axis, nothing, span
from explore.figures.base import RunFigure, text_pt

LABELS: Mapping[str, str] = {
    "flops_run": "Training FLOPs",
    "flops_train": "Training FLOPs per token",
    "flops_fwd": "Forward FLOPs per token",
    "params_total": "Parameters",
    "params_active": "Active parameters",
    "tokens": "Training tokens",
    "step": "Optimizer steps",
    "train_s": "Training time (s)",
    "tokens_per_s": "Training throughput (tokens/s)",
    "kv_bytes_per_token": "KV cache (bytes per token)",
    "ssm_state_bytes": "SSM state (bytes per sequence)",
    "val_bpb": "Validation bits per byte",
    "test_bpb": "Test bits per byte",
    "val_loss": "Validation loss (nats per token)",
    "train_loss": "Training loss (nats per token)",
    "recall": "Recall accuracy",
}
"""Axis label of a column; another column is labelled with its name."""

_UNTOLD = {"run": "", "family": "other", "pattern": ""}


def finished(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Columns run, family, pattern, x and y of the finished rows in which x and y are finite."""
    if x == y:
        raise ValueError(f"y: must be another column than x, got {y!r}")
    if missing := [column for column in ("run", "family", "pattern", x, y) if column not in table]:
        have = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"column {missing[0]!r} is not in the table of runs; its columns: {have}")
    if "status" in table:
        table = table[table["status"].eq("finished").fillna(False).astype(bool)]
    texts = {column: table[column].astype("str").fillna(other) for column, other in _UNTOLD.items()}
    numbers = {column: pd.to_numeric(table[column], errors="coerce").astype("float64") for column in (x, y)}
    known = pd.DataFrame({**texts, **numbers})
    return known.replace([np.inf, -np.inf], np.nan).dropna(subset=[x, y]).reset_index(drop=True)


def one_axes(
    table: pd.DataFrame, x: str, y: str, width: float, height: float, title: str | None
) -> tuple[RunFigure, Axes, float]:
    """A figure of a table of runs with one pair of axes, and the points of its text."""
    figure = RunFigure(width, height, title or f"{LABELS.get(y, y)} against {LABELS.get(x, x)}", table["run"])
    font_pt = text_pt(width)
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    return figure, figure.add_subplot(), font_pt


def dress_runs(ax: Axes, table: pd.DataFrame, font_pt: float, left: float = 0.05, side: int = 0) -> bool:
    """Scales, labels and grid of the axes; says whether there is anything to draw on them.

    Args:
        left: room left of the points, as a part of what they span.
        side: where labels need room: below the points (1), above them (-1) or nowhere (0).
    """
    x, y = map(str, table.columns[3:5])
    dress(ax, LABELS.get(x, x), LABELS.get(y, y), font_pt)
    if table.empty:
        nothing(ax, "no finished runs", font_pt)
        return False
    low, high = span(table[y])
    ax.set_ylim(low - (0.2 if side > 0 else 0.06) * (high - low), high + (0.2 if side < 0 else 0.06) * (high - low))
    if is_log(table[x]):
        log_axis(ax, table[x], left)
    else:
        low, high = span(table[x])
        ax.set_xlim(low - left * (high - low), high + 0.05 * (high - low))
    return True
