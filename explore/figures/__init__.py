"""Figures, each in three pieces: a table of exactly what is drawn, its drawing on axes, and a thin `plot_`."""

from explore.figures.base import (
    COLUMN_HEIGHT,
    COLUMN_WIDTH,
    FAMILIES,
    MARKERS,
    README_HEIGHT,
    README_WIDTH,
    FamilyStyle,
    RunFigure,
    family_styles,
    save_figure,
)
from explore.figures.bits import bits_table, draw_bits, plot_bits
from explore.figures.conventions import conventions_table, draw_conventions, plot_conventions
from explore.figures.cost import RECEIPTS, draw_receipts, group_colors, plot_receipts, receipts_table
from explore.figures.curves import curves_table, draw_curves, plot_curves
from explore.figures.cuts import cut_table, draw_cut, plot_cut
from explore.figures.decoding import (
    draw_latency,
    draw_state,
    draw_throughput,
    latency_table,
    plot_latency,
    plot_state,
    plot_throughput,
    state_table,
)
from explore.figures.frontier import draw_frontier, frontier_table, plot_frontier
from explore.figures.plan import draw_layouts, draw_plan_memory, layouts_table, plan_memory_table, plot_plans
from explore.figures.puzzle import draw_divergences, draw_quality, plot_tradeoff
from explore.figures.scores import draw_layers, draw_scores, layers_table, plot_scores, scores_table
from explore.figures.studies import VERDICTS, draw_comparisons, draw_laws, draw_levels, draw_search, mark, stacked

__all__ = [
    "COLUMN_HEIGHT",
    "COLUMN_WIDTH",
    "FAMILIES",
    "MARKERS",
    "README_HEIGHT",
    "README_WIDTH",
    "RECEIPTS",
    "VERDICTS",
    "FamilyStyle",
    "RunFigure",
    "bits_table",
    "conventions_table",
    "curves_table",
    "cut_table",
    "draw_bits",
    "draw_comparisons",
    "draw_conventions",
    "draw_curves",
    "draw_cut",
    "draw_divergences",
    "draw_frontier",
    "draw_latency",
    "draw_laws",
    "draw_layers",
    "draw_layouts",
    "draw_levels",
    "draw_plan_memory",
    "draw_quality",
    "draw_receipts",
    "draw_scores",
    "draw_search",
    "draw_state",
    "draw_throughput",
    "family_styles",
    "frontier_table",
    "group_colors",
    "latency_table",
    "layers_table",
    "layouts_table",
    "mark",
    "plan_memory_table",
    "plot_bits",
    "plot_conventions",
    "plot_curves",
    "plot_cut",
    "plot_frontier",
    "plot_latency",
    "plot_plans",
    "plot_receipts",
    "plot_scores",
    "plot_state",
    "plot_throughput",
    "plot_tradeoff",
    "receipts_table",
    "save_figure",
    "scores_table",
    "stacked",
    "state_table",
]
