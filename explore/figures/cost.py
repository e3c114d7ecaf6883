"""Cost breakdowns of models as stacked bars: parameters, FLOPs and bytes of each group of components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from explore.cost import DTYPES, MTP_LETTER, Dtypes
from explore.figures.axes import INK, draw_message, dress, rows_of_names
from explore.figures.base import README_WIDTH, Color, RunFigure, text_pt
from explore.figures.panels import in_a_row, outside_legend, panels
from explore.formatting import axis_scale, tokens
from explore.quantities import quantity

if TYPE_CHECKING:
    from explore.model import ModelConfig


RECEIPTS = (
    "params_total", "params_active", "flops_fwd", "flops_train", "flops_prefill", "flops_decode", "weight_bytes",
    "kv_bytes", "ssm_state_bytes", "conv_state_bytes", "decode_bytes", "all_to_all_bytes",
)  # fmt: skip
"""Totals of `Cost` that are sums over the ledger, and so can be broken down."""

_WITH_MTP = ("flops_fwd", "flops_train")
"""Totals that include multi-token prediction."""

HEAD, MTP = "embedding, head", "multi-token prediction"
"""Groups of components outside the blocks."""


@cache
def group_colors() -> Mapping[str, Color]:
    """Groups of components in stacking order, with colours that stay distinct under colour blindness."""
    from explore.blocks import GROUPS  # which needs torch
    from explore.model.display import MTP_COLOR

    of_blocks = {name: group.color for name, group in GROUPS.items()}
    return {HEAD: (0.71, 0.71, 0.71), **of_blocks, MTP: MTP_COLOR}


def group_of(model: ModelConfig, letter: str, component: str) -> str:
    """The group in `group_colors` of a component of the ledger; a norm belongs to its block."""
    if letter == MTP_LETTER:
        return MTP
    return model.blocks[letter].group_of(component) if letter else HEAD


def receipts_table(
    models: Mapping[str, ModelConfig],
    seq_len: int,
    quantities: Sequence[str] = ("params_active", "flops_fwd", "decode_bytes"),
    dtypes: Dtypes = DTYPES,
) -> pd.DataFrame:
    """Table for the figure of cost breakdowns: the part of each group, for every quantity and model.

    Args:
        models: models by the name on the axis.
        seq_len: tokens of a sequence, and of the decoding context.
        quantities: names in `RECEIPTS`.

    Returns:
        Columns quantity, model, group and value, in parameters, FLOPs or bytes. The groups of a model sum to the total
        of the same name in `Cost`; so FLOPs include multi-token prediction and parameters do not.

    Raises:
        ValueError: a quantity is unknown.
    """
    for total in quantities:
        if total not in RECEIPTS:
            raise ValueError(f"quantities must be of {', '.join(RECEIPTS)}, got {total!r}")
    rows = []
    ledgers = {name: model.ledger(seq_len).fold("component", dtypes) for name, model in models.items()}
    for total in quantities:
        for name, model in models.items():
            sums = dict.fromkeys(group_colors(), 0.0)
            for record in ledgers[name]:
                if record["letter"] != MTP_LETTER or total in _WITH_MTP:
                    group = group_of(model, record["letter"], record["component"])
                    sums[group] += record["params" if total == "params_total" else total]
            rows += [(total, name, group, value) for group, value in sums.items()]
    return pd.DataFrame(rows, columns=["quantity", "model", "group", "value"]).astype({"value": "float64"})


def draw_receipts(table: pd.DataFrame, ax: Axes, total: str, *, font_pt: float = 8.0, share: bool = False) -> None:
    """Draws one quantity: a bar per model, stacked by group, with the total as a number at its end.

    Args:
        table: from `receipts_table`.
        font_pt: size of the text in points.
        share: whether bars show percent of the model's total; the number at the end stays in the quantity's unit.
    """
    table = table.replace([np.inf, -np.inf], np.nan).dropna()
    names, about = list(dict.fromkeys(table["model"])), quantity(total)
    table = table[(table["quantity"] == total) & (table["value"] > 0)]
    totals = table.groupby("model")["value"].sum().reindex(names, fill_value=0.0)
    scale, unit = axis_scale(0.0 if table.empty else float(totals.max()), about.unit)
    dress(ax, f"{about.label} ({'%' if share else unit})", "", font_pt)
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    spoken = unit.removesuffix("s") if about.unit == "parameters" else unit.removesuffix("/token")  # 8.03 billion
    ends = dict.fromkeys(names, 0.0)
    for group, color in group_colors().items():
        rows = table[table["group"] == group]
        if rows.empty:
            continue
        widths = rows["value"].to_numpy() / (totals[rows["model"]].to_numpy() / 100 if share else scale)
        ax.barh(
            [names.index(name) for name in rows["model"]], widths, left=[ends[name] for name in rows["model"]],
            height=0.7, color=color, edgecolor="white", linewidth=0.04 * font_pt, label=group,
        )  # fmt: skip
        for name, width in zip(rows["model"], widths, strict=True):
            ends[name] += float(width)
    for i, name in enumerate(names):
        text = f"{totals[name] / scale:#.3g}".rstrip(".") + (f" {spoken}" if share else "")
        ax.annotate(text, (ends[name], i), (0.3 * font_pt, 0), textcoords="offset points", va="center_baseline",
                    fontsize=font_pt - 1, color=INK)  # fmt: skip
    longest = 100.0 if share else max(ends.values())
    ax.set_xlim(0, longest if share else 1.2 * longest)  # shares leave room for their longer numbers outside
    ticks = np.asarray(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, longest))
    ax.set_xticks(ticks[ticks <= longest])
    rows_of_names(ax, names)


def plot_receipts(
    models: Mapping[str, ModelConfig],
    seq_len: int,
    quantities: Sequence[str] = ("params_active", "flops_fwd", "decode_bytes"),
    dtypes: Dtypes = DTYPES,
    *,
    share: bool = False,
    width: float = README_WIDTH,
    height: float | None = None,
    title: str | None = None,
) -> RunFigure:
    """Plots cost breakdowns as stacked bars, a panel per quantity; arguments as in `receipts_table`.

    Args:
        share: whether bars show percent of each model's total.
        width: inches; panels are side by side on a page and stacked in a column.
        height: inches; None follows the number of bars.
        title: drawn above the panels if given.
    """
    table, font_pt = receipts_table(models, seq_len, quantities, dtypes), text_pt(width)
    label = f"Receipts at {tokens(seq_len)} tokens"
    figure, axes = panels(len(quantities), len(models), width, height, title, label, models)
    for total, ax in zip(quantities, axes, strict=True):
        draw_receipts(table, ax, total, font_pt=font_pt, share=share)
        if in_a_row(ax):  # too narrow for the label in one line
            ax.set_xlabel(ax.get_xlabel().replace(" (", "\n("))
    present = set(table["group"][table["value"] > 0])
    outside_legend(
        figure, [Patch(color=c, label=group) for group, c in group_colors().items() if group in present], font_pt
    )
    return figure
