"""A frontier

`explore plot` draws this for any folder of runs. Each marker is a trained model; solid ones are on the Pareto
front, because no other model has fewer FLOPs and fewer bits per byte. The records are those of
`sweeps/free_patterns.py`, one seed each.
"""

import pandas as pd

from explore import plot_frontier

trials = pd.read_csv("sweeps/records/free_patterns.csv")
figure = plot_frontier(trials)
