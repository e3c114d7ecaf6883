"""Learning curves

Training loss against the training FLOPs so far, as a running mean over 20 steps. Each run has one line, in the colour
of its family. `load_metrics` reads the curves of all runs below a folder, or in a file of records.
"""

from explore.figures import plot_curves
from explore.table import load_metrics

metrics = load_metrics("sweeps/records/attention_share.parquet")
metrics = metrics[metrics["run"].str.match(r"text-(0|25|100)-d48")].sort_values(["run", "step"])
metrics["loss"] = metrics.groupby("run")["loss"].transform(lambda loss: loss.rolling(20).mean())
figure = plot_curves(metrics, y="loss")
