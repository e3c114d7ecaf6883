"""Differences from a baseline

Differences from the best hand-made model with 95% intervals, from three seeds. A filled marker is a comparison that
was named before the runs. This study has no gate, so it shows the drawing and claims nothing.
[Frontier statistics](concepts/frontier.md) explains the verdicts.
"""

from explore import load_runs
from explore.figures import README_WIDTH, draw_comparisons, mark, stacked
from explore.frontier import compare

runs = load_runs("sweeps/records/searched_winners.parquet")
runs = runs.assign(arm=runs["name"])
differences = compare(runs, "arm", "hand1", primary=["found1"])
names = {arm: f"{arm}: {rows['pattern'].iloc[0]}" for arm, rows in runs.groupby("arm")}
figure, (ax,) = stacked([3.2], "Differences from the best hand-made model", README_WIDTH)
draw_comparisons(ax, differences, names, "Test bits per byte, difference from hand1", font_pt=8.5)
mark(figure, "ungated", font_pt=8.5)
