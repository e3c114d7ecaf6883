"""How many workers a sweep has on this machine: one for each core where models are small, else one with all of them.

Threads that share the products of a small model wait for one another more than they compute. What that costs is from a
measured table, `sharing.csv`: training FLOPs of a step, and tokens per second of one run with all cores and of as many
runs with one core each. `explore bench --what sharing --save` measures another on this machine, which is taken from
then on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from explore.data.cache import cache_folder
from explore.experiment import Experiment
from explore.machine import memory_bytes
from explore.table import read_table
from explore.threads import n_cores

SHIPPED = Path(__file__).with_name("sharing.csv")
NUMBERS = ("flops_step", "together_tokens_per_s", "apart_tokens_per_s")
GAIN = 1.1
"""Times the tokens per second from which on runs with one core each are worth the memory of as many processes."""
WORKER_BYTES = 1 << 30
"""Memory of a worker with a small model: Python, torch and what else it imports take two thirds of it."""


def own_table() -> Path:
    """The file of a table that was measured on this machine."""
    return cache_folder("bench") / "sharing.csv"


def choose_workers(experiments: Sequence[Experiment], n_trials: int) -> int:
    """Workers for experiments like these, by the mean of the FLOPs of a step."""
    return workers_for(statistics.fmean(each.flops_run / each.n_steps for each in experiments), n_trials)


def workers_for(flops_step: float, n_trials: int) -> int:
    """Workers for models of which a step takes so many training FLOPs: one, or as many as there are cores.

    There are no more than trials, and none for which the memory is too small.

    Raises:
        ValueError: the table that was measured on this machine is none.
    """
    most = int(min(n_cores(), n_trials, memory_bytes()[1] // WORKER_BYTES))
    if most < 2 or torch.accelerator.is_available():
        return 1
    own = own_table()
    return most if flops_step <= _largest_step(own if own.exists() else SHIPPED) else 1


def _largest_step(path: Path) -> float:
    """FLOPs of the largest step that was measured for which runs with one core each do more together; 0 for none."""
    try:
        table = read_table(path)
        numbers = table[[*NUMBERS]].to_numpy(dtype=float)
        if not (len(numbers) and np.isfinite(numbers).all() and (numbers > 0).all()):
            raise ValueError(f"it must have numbers above 0 in {', '.join(NUMBERS)}")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; `explore bench --what sharing --save` makes it anew") from None
    gains: pd.Series[bool] = table["apart_tokens_per_s"] >= GAIN * table["together_tokens_per_s"]
    return float(table.loc[gains, "flops_step"].max()) if gains.any() else 0.0
