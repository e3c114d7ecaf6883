"""Chooses the number of workers of a sweep on this machine: one per core for small models, else one on all cores.

Threads that share the matrix products of a small model wait more than they compute. The table `sharing.csv` has the
measured cost: training FLOPs of a step, tokens per second of one run on all cores, and of one run per core.
`explore bench --what sharing --save` measures a table on this machine, which is then used instead.
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
"""Minimum speed-up at which one run per core is worth the memory of several processes."""
WORKER_BYTES = 1 << 30
"""Memory of a worker with a small model; Python, torch and other imports take two thirds of it."""


def own_table() -> Path:
    """The path of the table measured on this machine."""
    return cache_folder("bench") / "sharing.csv"


def choose_workers(experiments: Sequence[Experiment], n_trials: int) -> int:
    """Number of workers for experiments like these, from their mean FLOPs per step."""
    return workers_for(statistics.fmean(each.flops_run / each.n_steps for each in experiments), n_trials)


def workers_for(flops_step: float, n_trials: int) -> int:
    """Number of workers for models with `flops_step` training FLOPs per step: one, or one per core.

    The number is limited by the trials and by memory.

    Raises:
        ValueError: the table measured on this machine is invalid.
    """
    most = int(min(n_cores(), n_trials, memory_bytes()[1] // WORKER_BYTES))
    if most < 2 or torch.accelerator.is_available():
        return 1
    own = own_table()
    return most if flops_step <= _largest_step(own if own.exists() else SHIPPED) else 1


def _largest_step(path: Path) -> float:
    """FLOPs of the largest measured step at which one run per core is faster in total; 0 if there is none."""
    try:
        table = read_table(path)
        numbers = table[[*NUMBERS]].to_numpy(dtype=float)
        if not (len(numbers) and np.isfinite(numbers).all() and (numbers > 0).all()):
            raise ValueError(f"it must have numbers above 0 in {', '.join(NUMBERS)}")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}; `explore bench --what sharing --save` measures it again") from None
    gains: pd.Series[bool] = table["apart_tokens_per_s"] >= GAIN * table["together_tokens_per_s"]
    return float(table.loc[gains, "flops_step"].max()) if gains.any() else 0.0
