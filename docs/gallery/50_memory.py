"""Memory of a training run

Memory of every pipeline rank of DeepSeek-V3 on 256 GPUs, in the layout of table 3 of arXiv 2603.07685, with the
capacity of a GB300 as a dashed line. `explore plan --figure FILE` writes such a figure.
"""

from explore import preset
from explore.figures import plot_plans
from explore.plan import Cluster, Layout, Plan, Run

layout = Layout(pp=4, ep=64, pipeline="Et*4|(tttt|)*14tmL")
run = Run(seq_len=4096, global_batch=8192)
figure = plot_plans({"deepseek-v3": Plan.of(preset("deepseek-v3"), run, layout, Cluster.named("GB300x256"))})
