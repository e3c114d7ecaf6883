"""Throughput of layouts

For every value of every parallel degree, the throughput of the best layout that has it: Nemotron 3 Super in FP8 on
256 H100s. A cross marks a value for which no layout is legal or fits.
"""

from explore import preset
from explore.figures import README_WIDTH, draw_layouts, layouts_table, stacked
from explore.plan import Cluster, Run, search

run = Run(seq_len=8192, global_batch=1024, precision="fp8")
found = search(preset("nemotron-3-super"), Cluster.named("H100x256"), run)
figure, (ax,) = stacked([3.2], "Throughput of layouts", README_WIDTH)
draw_layouts(layouts_table({"nemotron-3-super": found}), ax, font_pt=8.5)
