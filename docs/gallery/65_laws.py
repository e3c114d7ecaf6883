"""Power laws

Saturating power laws of loss against compute, one for each arm, with one irreducible loss for all and bootstrap
bands. Markers are means over seeds. This study does not pass its gate, so it shows the drawing and claims nothing.
"""

from explore import load_runs
from explore.figures import README_WIDTH, draw_laws, mark, stacked
from explore.frontier import fit_power_laws, seed_bands

runs = load_runs("sweeps/records/latent_or_not.parquet")
runs = runs.assign(arm=runs["name"].str.rpartition("-d")[0])
arms = {"moe": "standard MoE", "acc4": "acc, 4x", "eff4": "eff, 4x"}
runs = runs[runs["arm"].isin(arms) & (runs["d_model"] <= 64)]
laws = fit_power_laws(runs, "arm", loss="test_bpb")
bands = seed_bands(runs, ["arm", "d_model"], error="test_bpb")
figure, (ax,) = stacked([3.6], "Loss against compute", README_WIDTH)
draw_laws(ax, bands, laws.curves().rename(columns={"family": "arm"}), arms, font_pt=8.5)
mark(figure, "ungated", font_pt=8.5)
