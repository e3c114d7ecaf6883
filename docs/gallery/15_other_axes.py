"""The same runs on other axes

Any quantity can be on either axis. Here are all parameters and bits per byte on the test text.
"""

import pandas as pd

from explore import plot_frontier

trials = pd.read_csv("sweeps/records/free_patterns.csv")
figure = plot_frontier(trials, x="params_total", y="test_bpb")
